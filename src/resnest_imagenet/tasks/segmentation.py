"""Scenes to a class for each pixel, as in the paper's Table 7."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.geometry import SceneTransform
from resnest_imagenet.data.loader import Loader, to_pixels
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.scene_loader import SceneLoader
from resnest_imagenet.data.scenes import VOID, open_scenes
from resnest_imagenet.data.source import print_notes, require_same_classes, require_separate
from resnest_imagenet.distributed import Ranks, launched_as
from resnest_imagenet.evaluation.overlays import overlay_mask
from resnest_imagenet.evaluation.region_files import encode_iou, encode_scenes
from resnest_imagenet.evaluation.regions import Regions, measure_regions
from resnest_imagenet.evaluation.score import Score
from resnest_imagenet.inference.segmenter import choose_protocol
from resnest_imagenet.models.batch import require_batch
from resnest_imagenet.models.cost import count_deeplab, count_kept_deeplab
from resnest_imagenet.models.deeplab import DeepLabV3, build_deeplab
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.zoo import require_model
from resnest_imagenet.randomness import Draws
from resnest_imagenet.recipe import RegionProtocolOptions, SegmentationRecipe
from resnest_imagenet.tasks.digests import describe_images
from resnest_imagenet.tasks.pictures import draw_matrix, tile
from resnest_imagenet.tasks.task import Evaluate, Pause
from resnest_imagenet.weights.segmentation import start_deeplab

Batch = tuple[Tensor, Tensor]  # images (B, 3, crop, crop), normalised; masks int64 (B, crop, crop) with VOID

NUM_SHOWN = 4  # scenes of a batch
# More than any network keeps per input pixel at output stride 8: resnest269 with 150 classes keeps 27,000.
_BYTES_PER_PIXEL = 40_000


class Segmentation:
    """Implements `tasks.task.Task`."""

    metric: str = "miou"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        recipe = self._recipe
        require_model(config.model.name)
        data = config.data
        self._train, self._val = (
            open_scenes(data.kind, data.root, part, f"data.{name}")
            for part, name in ((data.train_dir, "train_dir"), (data.val_dir, "val_dir"))
        )
        self.train_set, self.val_set = self._train.images, self._val.images
        require_separate(self.train_set.root, self.val_set.root)
        require_same_classes(self.train_set, self.val_set)
        if launched_as().rank == 0:
            print_notes(self.train_set, self.val_set)
        self.classes, self.palette = self._train.classes, self._train.palette
        network = config.model.model_copy(update={"num_classes": len(self.classes)})
        self.config = config.model_copy(update={"model": network})
        self.head: tuple[str, ...] = ("head", "auxiliary") if recipe.auxiliary_weight else ("head",)
        require_batch(config.model.name, recipe.batch_size, recipe.crop, build=self._build)
        self._protocol = choose_protocol(cast(RegionProtocolOptions, config.protocol), recipe.crop, recipe.base)

    @property
    def _recipe(self) -> SegmentationRecipe:
        return cast(SegmentationRecipe, self.config.train)

    @property
    def _options(self) -> dict[str, Any]:
        """The options of `build_deeplab`."""
        recipe = self._recipe
        return {
            "output_stride": recipe.output_stride,
            "rates": recipe.rates,
            "channels": recipe.head_channels,
            "norm": recipe.norm,
            "auxiliary": recipe.auxiliary_weight > 0,
            "zero_gamma": recipe.zero_gamma,
        }

    def _options_on(self, device: torch.device) -> dict[str, Any]:
        """The same with batch norms of its own for a rank that cannot synchronise them."""
        can_synchronise = launched_as().world_size > 1 and device.type == "cuda"
        is_own = self._recipe.norm == "sync" and not can_synchronise
        return self._options | ({"norm": "bn"} if is_own else {})

    def _build(self, device: torch.device | None = None) -> DeepLabV3:
        options = self._options if device is None else self._options_on(device)
        return build_deeplab(self.config.model.name, len(self.classes), **options)

    def identify(self, ranks: Ranks, tick: Callable[[], None]) -> dict[str, Any]:
        """See `Task`."""
        config, parts = self.config, {"training": self._train, "val": self._val}
        files = {name: scenes.images for name, scenes in parts.items()}
        files |= {f"{name}_mask": scenes.masks for name, scenes in parts.items()}
        return {
            "model.name": config.model.name,
            "data.kind": config.data.kind,
            "evaluation": self._protocol.text,
            "classes": list(self.classes),
            **describe_images(files, config.data.digest, ranks, tick),
        }

    def count_kept_bytes(self, device: torch.device, enough: float = 0) -> int:
        """See `Task`."""
        recipe = self._recipe
        bound = recipe.batch_size * recipe.crop**2 * _BYTES_PER_PIXEL
        if bound < enough:
            return bound
        with autocast(device, recipe.precision):
            name, num_classes, options = self.config.model.name, len(self.classes), self._options_on(device)
            return count_kept_deeplab(name, num_classes, recipe.crop, recipe.batch_size, device, **options)

    def build_model(self, is_new: bool, device: torch.device) -> nn.Module:
        """See `Task`; batch norms are synchronised if there are several ranks and the device supports it."""
        recipe = self._recipe
        torch.manual_seed(self.config.seed)
        launch = launched_as()
        if recipe.norm == "sync" and launch.world_size > 1 and launch.rank == 0 and device.type == "cpu":
            print("train.norm=sync: on a CPU the statistics of batch norms are each rank's own", flush=True)
        model = self._build(device)
        if is_new and recipe.init_from is not None:
            loaded = start_deeplab(model, self.config.model.name, self.classes, recipe.init_from)
            if launch.rank == 0:
                print(f"starting from {recipe.init_from}: {loaded}", flush=True)
        return place(model, device)

    def plan_batches(self, num_batches: int, ranks: Ranks) -> BatchPlan:
        """See `Task`."""
        return BatchPlan(
            num_samples=len(self._train),
            batch_size=self._recipe.batch_size,
            num_batches=num_batches,
            rank=ranks.rank,
            world_size=ranks.world_size,
            shuffle=True,
            seed=self.config.seed,
        )

    def choose_train_loader(self, device: torch.device, saved: str | None = None) -> None:
        """See `Task`: there is one loader."""

    def build_loader(self, plan: BatchPlan, ranks: Ranks) -> Loader:
        """See `Task`."""
        data = self.config.data
        transform = build_scene_transform(self._recipe, self.config.seed)
        max_errors = data.max_errors if data.on_error == "substitute" else 0
        return SceneLoader(self._train, plan, transform, ranks.device, self.config.loader.workers, max_errors)

    def build_evaluation(self, ranks: Ranks) -> Evaluate:
        """See `Task`."""
        scenes, workers = self._val, self.config.loader.workers
        plan = plan_evaluation(len(scenes), 1, ranks.rank, ranks.world_size)
        loader = SceneLoader(scenes, plan, None, ranks.device, workers)

        def evaluate(model: nn.Module, pause: Pause) -> Score:
            folded, num_classes = fold_batch_norms(model), len(self.classes)
            precision, name = self._recipe.precision, scenes.images.name
            regions = measure_regions(folded, loader, ranks, self._protocol, num_classes, precision, pause, name)
            return self._describe_regions(regions)

        return evaluate

    def _describe_regions(self, regions: Regions) -> Score:
        protocol, images = self._protocol.text, self.val_set
        title = f"% of the true pixels: mIoU {regions.miou:.2f} % of {regions.count} scenes"
        return Score(
            values={
                "miou": regions.miou,
                "miou_present": regions.miou_present,
                "pixel_accuracy": regions.pixel_accuracy,
                "count": regions.count,
                "protocol": protocol,
            },
            text=f"mIoU {regions.miou:.2f} % ({regions.miou_present:.2f} % of the {regions.is_present.sum()} classes "
            f"present), pixel accuracy {regions.pixel_accuracy:.2f} % of {regions.count} scenes ({protocol})",
            pictures={"confusions": partial(draw_matrix, regions.matrix, self.classes, title, in_percent=True)},
            files={
                "iou.csv": partial(encode_iou, [(protocol, regions)], self.classes),
                "scenes.csv": partial(encode_scenes, images, [(protocol, regions)]),
            },
        )

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Return the cross entropy of the labelled pixels, and that of the auxiliary head times its weight."""
        recipe, (images, masks) = self._recipe, batch
        with autocast(images.device, recipe.precision):
            outputs = network(images)
        if not recipe.auxiliary_weight:
            return {"cross_entropy": masked_cross_entropy(outputs, masks)}
        logits, auxiliary = outputs
        return {
            "cross_entropy": masked_cross_entropy(logits, masks),
            "auxiliary": recipe.auxiliary_weight * masked_cross_entropy(auxiliary, masks),
        }

    def blank_batch(self, device: torch.device) -> Batch:
        """See `Task`; channels_last like the loader's batches."""
        recipe = self._recipe
        images = torch.zeros(recipe.batch_size, 3, recipe.crop, recipe.crop, device=device)
        masks = torch.zeros(recipe.batch_size, recipe.crop, recipe.crop, dtype=torch.int64, device=device)
        return images.to(memory_format=torch.channels_last), masks

    def show(self, batch: Batch, draws: Draws) -> Callable[[], np.ndarray]:
        """See `Task`: each scene, plain and under the colours of its mask."""
        images, masks = (tensor[:NUM_SHOWN].clone() for tensor in batch)
        palette = self.palette

        def draw() -> np.ndarray:
            pictures = []
            for picture, mask in zip(to_pixels(images), masks.cpu().numpy().astype(np.uint8), strict=True):
                pictures += [picture, overlay_mask(picture, mask, palette)]
            return tile(pictures)

        return draw

    def describe(self, counts_cost: bool) -> dict[str, str]:
        """See `Task`; pixels per class are not counted, because that would read all masks."""
        name, crop, cost = self.config.model.name, self._recipe.crop, ""
        if counts_cost:
            stages = count_deeplab(name, len(self.classes), crop, **self._options)
            cost = f", {sum(stage.multiply_adds for stage in stages) / 1e9:.1f} GFLOPs at {crop}"
        return {
            "network": f"DeepLabV3 on {name}, {len(self.classes)} classes{cost}",
            "data": f"{len(self._train):,} training and {len(self._val):,} val scenes in {self.config.data.root}",
            "evaluation": self._protocol.text,
        }


def build_scene_transform(recipe: SegmentationRecipe, seed: int) -> SceneTransform:
    """Return a recipe's transform of scenes."""
    scales = (recipe.scales[0], recipe.scales[1])
    return SceneTransform(recipe.crop, recipe.base, seed, scales, recipe.blur)


def masked_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross entropy of the labelled pixels; 0 if there are none.

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, H, W), class indices and VOID.
    """
    # On CUDA torch adds the pixels in any order, unless they are added apart from that.
    reduction = "none" if torch.are_deterministic_algorithms_enabled() else "sum"
    total = F.cross_entropy(logits.float(), masks, ignore_index=VOID, reduction=reduction).sum()
    return total / (masks != VOID).sum().clamp(min=1)
