"""The task of detection: boxes and masks of objects, as in the paper's Tables 5 and 6."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.coco import Instances, open_coco, require_separate_images
from resnest_imagenet.data.instance_geometry import InstanceTransform
from resnest_imagenet.data.instance_loader import InstanceLoader, restore_pixels
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.source import ImageSource, describe_counts, print_notes, require_same_classes
from resnest_imagenet.distributed import Ranks, launched_as, sum_over_ranks
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.evaluation.box_files import list_files
from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette
from resnest_imagenet.evaluation.boxes import BoxScores, measure_boxes
from resnest_imagenet.evaluation.ground_truth import open_ground_truth
from resnest_imagenet.evaluation.score import Score
from resnest_imagenet.instances import STRIDE, Target
from resnest_imagenet.models.batch import require_batch
from resnest_imagenet.models.cost import count_kept_rcnn, count_rcnn
from resnest_imagenet.models.precise import estimate_norms
from resnest_imagenet.models.rcnn import RCNN, build_rcnn
from resnest_imagenet.models.rcnn_options import title_detector
from resnest_imagenet.models.zoo import find_pixels, require_model
from resnest_imagenet.randomness import Draws
from resnest_imagenet.recipe import BoxProtocolOptions, DetectionRecipe
from resnest_imagenet.tasks.digests import describe_images
from resnest_imagenet.tasks.pictures import tile
from resnest_imagenet.tasks.task import Evaluate, Pause
from resnest_imagenet.weights.detection import read_options, start_rcnn

Batch = tuple[Tensor, list[Target]]  # images (B, 3, H, W), normalised and padded; the objects of each

NUM_SHOWN = 4  # images of a batch
# Upper bounds with 256 channels in the pyramid. A network keeps at most 7,900 bytes of a pixel of its input
# (resnest269), and 220,000 bytes of a sampled box for each convolution of its heads (a cascade).
_BYTES_PER_PIXEL, _BYTES_PER_CONV = 12_000, 250_000


class Detection:
    """Implements `tasks.task.Task`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        recipe = self._recipe
        self._protocol = cast(BoxProtocolOptions, config.protocol)
        require_model(config.model.name)
        data = config.data
        if data.kind != "coco":
            raise ConfigError(f"data.kind={data.kind}: a detector is trained on data=coco")
        if config.loader.name == "dali":
            raise ConfigError("loader=dali: a detector's images are decoded without DALI: set loader=auto")
        self._train = open_coco(data.root, "train", data.train_json, data.train_dir, masks=recipe.masks)
        self._val = open_coco(data.root, "val", data.val_json, data.val_dir, masks=recipe.masks)
        self.train_set: ImageSource = self._train.images
        self.val_set: ImageSource = self._val.images
        require_separate_images(self._train, self._val)
        require_same_classes(self.train_set, self.val_set)
        if launched_as().rank == 0:
            print_notes(self.train_set, self.val_set)
        self.classes, self.category_ids = self._train.classes, self._train.category_ids
        self._truth = open_ground_truth(self._val, masks=recipe.masks)
        if config.model.num_classes not in (None, len(self.classes)):
            categories = f"{self._train.json} has {len(self.classes)} categories"
            raise ConfigError(
                f"model.num_classes={config.model.num_classes}, but {categories}: set model.num_classes=null"
            )
        network = config.model.model_copy(update={"num_classes": len(self.classes)})
        self.config = config.model_copy(update={"model": network})
        self.metric = "mask_ap" if recipe.masks else "box_ap"
        self.head: tuple[str, ...] = ("fpn", "rpn", "roi_heads")
        self._options = read_options(recipe.model_dump(), self._protocol.model_dump())
        with torch.device("meta"):
            self._build(torch.device("cpu"))  # refuses options that do not fit together
        require_batch(
            config.model.name, recipe.batch_size, min(recipe.short_sides), build=lambda: self._build().backbone
        )

    @property
    def _recipe(self) -> DetectionRecipe:
        return cast(DetectionRecipe, self.config.train)

    def _options_on(self, device: torch.device) -> dict[str, Any]:
        """Return the network's options with batch norms of its own for a rank that cannot synchronise them."""
        if launched_as().world_size > 1 and device.type == "cuda":
            return self._options
        return self._options | {name: "bn" for name in ("norm", "head_norm") if self._options[name] == "sync"}

    def _build(self, device: torch.device | None = None) -> RCNN:
        options = self._options if device is None else self._options_on(device)
        return build_rcnn(self.config.model.name, len(self.classes), **options)

    @property
    def _largest(self) -> tuple[int, int]:
        """Height and width of the largest batch, in pixels."""
        short_side, longest = max(self._recipe.short_sides), self._recipe.longest
        height, width = (math.ceil(side / STRIDE) * STRIDE for side in (min(short_side, longest), longest))
        return height, width

    def identify(self, ranks: Ranks, tick: Callable[[], None]) -> dict[str, Any]:
        """See `Task`."""
        config, files = self.config, {"training": self.train_set, "val": self.val_set}
        return {
            "model.name": config.model.name,
            "data.kind": config.data.kind,
            "evaluation": self._protocol.text,
            "classes": list(self.classes),
            **describe_images(files, config.data.digest, ranks, tick),
            "training objects": self._train.digest(),
            "val objects": self._val.digest(),
        }

    def count_kept_bytes(self, device: torch.device, enough: float = 0) -> int:
        """See `Task`; of the largest images."""
        recipe, (height, width) = self._recipe, self._largest
        of_boxes = recipe.samples * (1 + recipe.box_convs + recipe.mask_convs) * _BYTES_PER_CONV
        bound = recipe.batch_size * max(1.0, recipe.channels / 256) * (height * width * _BYTES_PER_PIXEL + of_boxes)
        if bound < enough:
            return int(bound)
        with autocast(device, recipe.precision):
            name, num_classes, options = self.config.model.name, len(self.classes), self._options_on(device)
            return count_kept_rcnn(name, num_classes, self._largest, recipe.batch_size, device, **options)

    def build_model(self, is_new: bool, device: torch.device) -> nn.Module:
        """See `Task`; batch norms are synchronised over several ranks on a device that supports it."""
        recipe = self._recipe
        torch.manual_seed(self.config.seed)
        launch = launched_as()
        synchronised = [name for name in ("norm", "head_norm") if self._options[name] == "sync"]
        if synchronised and launch.world_size > 1 and launch.rank == 0 and device.type == "cpu":
            option = f"train.{synchronised[0]}=sync"
            print(f"{option}: on a CPU the statistics of batch norms are each rank's own", flush=True)
        model = self._build(device)
        if is_new and recipe.init_from is not None:
            loaded = start_rcnn(model, self.config.model.name, self.classes, recipe.init_from)
            if launch.rank == 0:
                print(f"starting from {recipe.init_from}: {loaded}", flush=True)
        elif is_new and recipe.freeze_at and launch.rank == 0:
            print(f"train.freeze_at={recipe.freeze_at}: without train.init_from these stages stay random", flush=True)
        return place(model, device)

    def plan_batches(self, num_batches: int, ranks: Ranks) -> BatchPlan:
        """See `Task`; a batch has portrait images only, or landscape images only."""
        return BatchPlan(
            num_samples=len(self._train),
            batch_size=self._recipe.batch_size,
            num_batches=num_batches,
            rank=ranks.rank,
            world_size=ranks.world_size,
            shuffle=True,
            seed=self.config.seed,
            groups=self._train.groups,
        )

    def choose_train_loader(self, device: torch.device, saved: str | None = None) -> None:
        """See `Task`: there is one loader."""

    def build_loader(self, plan: BatchPlan, ranks: Ranks) -> Loader:
        """See `Task`."""
        data = self.config.data
        transform = build_instance_transform(self._recipe, self.config.seed)
        max_errors = data.max_errors if data.on_error == "substitute" else 0
        pixels, workers = find_pixels(self.config.model.name), self.config.loader.workers
        return InstanceLoader(self._train, plan, transform, ranks.device, pixels, workers, max_errors)

    def build_evaluation(self, ranks: Ranks) -> Evaluate:
        """See `Task`; `precise_batches` first computes the statistics of the norms again, see `models.precise`."""
        recipe, workers = self._recipe, self.config.loader.workers
        loader = build_val_loader(self._val, self._protocol, self.config.model.name, ranks, workers)
        precise = self._build_precise(ranks) if recipe.precise_batches else None

        def evaluate(model: nn.Module, pause: Pause) -> Score:
            if precise is not None:
                precise(model, pause)
            name, first = self.val_set.name, recipe.precise_batches

            def pause_after(batch: int, is_everywhere: bool) -> None:
                pause(first + batch, is_everywhere)

            scores = measure_boxes(
                model, loader, ranks, self._truth, recipe.precision, pause_after, name, masks=recipe.masks
            )
            return self._describe_boxes(scores)

        return evaluate

    def _build_precise(self, ranks: Ranks) -> Callable[[nn.Module, Pause], None]:
        """Return a function that computes the norms' statistics over the first batches of training, from epoch 0 on.

        The batches are always the same, so the statistics are a function of the weights, and an evaluation can be
        repeated.

        Raises:
            DataError: there is no batch for each rank.
        """
        recipe, world_size = self._recipe, ranks.world_size
        per_epoch = len(self._train) // (recipe.batch_size * world_size) * world_size
        if not per_epoch:
            raise DataError(
                f"{len(self._train)} training images are less than a batch of {recipe.batch_size} for each of "
                f"{world_size} ranks, which train.precise_batches needs: lower train.batch_size"
            )
        loader = self.build_loader(self.plan_batches(per_epoch, ranks), ranks)

        def estimate(model: nn.Module, pause: Pause) -> None:
            def run(numbered: tuple[int, Batch]) -> None:
                number, batch = numbered
                pause(number, True)
                # Seed each batch, as in training: a loader that begins an epoch draws from torch's generator too.
                draws = Draws(self.config.seed, 0, number * world_size + ranks.rank)
                draws.seed_torch()
                self.loss(model, batch, draws)

            epochs = itertools.chain.from_iterable(loader.batches(epoch) for epoch in itertools.count())
            batches = enumerate(itertools.islice(epochs, recipe.precise_batches))
            estimate_norms(model, batches, run, lambda values: sum_over_ranks(values) / world_size)

        return estimate

    def _describe_boxes(self, scores: BoxScores) -> Score:
        values = {name: 0.0 if value is None else value for name, value in scores.values().items()}
        shown = ", ".join(
            f"{kind.kind} AP {values[f'{kind.kind}_ap']:.2f} (AP50 {values[f'{kind.kind}_ap50']:.2f}, "
            f"AP75 {values[f'{kind.kind}_ap75']:.2f})"
            for kind in scores.kinds
        )
        protocol = self._protocol.text
        return Score(
            values={**values, "count": len(self._val), "protocol": protocol},
            text=f"{shown} of {len(self._val)} images ({protocol})",
            files=list_files(scores, self._truth, self.val_set),
        )

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Return the losses of proposals, boxes and masks."""
        images, targets = batch
        with autocast(images.device, self._recipe.precision):
            return network(images, targets)

    def blank_batch(self, device: torch.device) -> Batch:
        """See `Task`: the largest images, with one object each; channels_last like the loader's batches.

        Without objects the mask head would have no boxes on any rank, which torch's SyncBatchNorm does not support in
        half precision.
        """
        recipe, size = self._recipe, self._largest
        images = torch.zeros(recipe.batch_size, 3, *size, device=device).to(memory_format=torch.channels_last)
        height, width = size
        boxes = torch.tensor([[0.0, 0.0, width, height]], device=device)
        mask = [np.array([0.0, 0.0, width, 0.0, width, height, 0.0, height])]
        labels = torch.zeros(1, dtype=torch.int64, device=device)
        target = Target(0, size, size, boxes, labels, masks=[mask] if recipe.masks else None)
        return images, [target] * recipe.batch_size

    def show(self, batch: Batch, draws: Draws) -> Callable[[], np.ndarray]:
        """See `Task`: the images with their objects."""
        images, targets = batch[0][:NUM_SHOWN].clone(), batch[1][:NUM_SHOWN]
        pixels, classes = find_pixels(self.config.model.name), self.classes
        palette = make_box_palette(len(classes))

        def draw() -> np.ndarray:
            pictures = []
            for picture, target in zip(restore_pixels(images, pixels), targets, strict=True):
                boxes, labels = target.boxes.cpu().numpy(), target.labels.cpu().numpy()
                pictures.append(draw_detections(picture, boxes, labels, classes, palette))
            return tile(pictures)

        return draw

    def describe(self, counts_cost: bool) -> dict[str, str]:
        """See `Task`; multiply-adds are those of the largest image."""
        name, cost = self.config.model.name, ""
        if counts_cost:
            height, width = self._largest
            stages = count_rcnn(name, len(self.classes), self._largest, **self._options)
            cost = f", {sum(stage.multiply_adds for stage in stages) / 1e9:.1f} GFLOPs at {height} x {width}"
        kind = title_detector(self._recipe.cascade, self._recipe.masks)
        return {
            "network": f"{kind} on {name}, {len(self.classes)} classes{cost}",
            "data": f"{len(self._train):,} training and {len(self._val):,} val images in {self.config.data.root}, "
            f"{len(self._train.boxes):,} objects to learn from",
            "objects per class": describe_counts(self._train.labels, self.classes),
            "evaluation": self._protocol.text,
        }


def build_instance_transform(recipe: DetectionRecipe, seed: int) -> InstanceTransform:
    """Return the transform of training images."""
    sides = recipe.short_sides
    if recipe.side_sampling == "range":
        sides = list(range(sides[0], sides[1] + 1))
    return InstanceTransform(seed, tuple(sides), recipe.longest)


def build_val_loader(
    instances: Instances, protocol: BoxProtocolOptions, name: str, ranks: Ranks, workers: int | None
) -> InstanceLoader:
    """Build the loader of an evaluation: each image once over all ranks, one per batch, so without another's padding.

    Args:
        instances: of `open_coco`.
        protocol: how images are shown.
        name: of the backbone; it decides how pixels are normalised.
        ranks: who takes part.
        workers: processes of the loader; None: this process's cores, at most 8.
    """
    plan = plan_evaluation(len(instances), 1, ranks.rank, ranks.world_size)
    transform = InstanceTransform(0, (protocol.short_side,), protocol.longest, flip=0)
    unmasked = replace(instances, masks=None)  # the ground truth has the masks of an evaluation
    return InstanceLoader(unmasked, plan, transform, ranks.device, find_pixels(name), workers)
