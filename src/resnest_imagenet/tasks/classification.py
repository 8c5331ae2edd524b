"""Images to classes, as in the paper's Table 3."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.loader import Loader, build_loader, choose_loader
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.shared_images import describe_shared
from resnest_imagenet.data.source import ImageSource, describe_counts, print_notes
from resnest_imagenet.data.transforms import ERandomCrop, EvalTransform, RandomResizedCrop, TrainTransform, to_levels
from resnest_imagenet.distributed import Ranks, choose_device, launched_as
from resnest_imagenet.errors import ConfigError, printable
from resnest_imagenet.evaluation.accuracy import TOP, Evaluation, measure_accuracy
from resnest_imagenet.evaluation.mistakes import count_confusions, measure_classes
from resnest_imagenet.evaluation.predictions import encode_predictions
from resnest_imagenet.evaluation.score import Score
from resnest_imagenet.inference.labels import name_outputs
from resnest_imagenet.models.batch import require_batch
from resnest_imagenet.models.cost import count_cost, count_kept
from resnest_imagenet.models.drop_path import add_drop_path
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.stages import freeze_stages, keep_in_evaluation
from resnest_imagenet.models.zoo import build_model, find_head, require_model
from resnest_imagenet.options import format_value
from resnest_imagenet.randomness import Draws, Purpose
from resnest_imagenet.recipe import ClassificationEvalOptions, ClassificationRecipe
from resnest_imagenet.tasks.digests import describe_images
from resnest_imagenet.tasks.mixing import (
    Mixing,
    balance_classes,
    draw_cutmix,
    draw_mixup,
    erase_rectangles,
    one_hot,
    smoothed_cross_entropy,
)
from resnest_imagenet.tasks.pictures import draw_confusions, draw_samples
from resnest_imagenet.tasks.task import Evaluate, Pause
from resnest_imagenet.weights.load import Weights, read_weights, start_from

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), normalised; labels int64 (B,)

NUM_SHOWN = 16  # images of a batch
# More than any network keeps per input pixel: on a GPU resnest269 keeps 7,500, resnest50 2,100.
_BYTES_PER_PIXEL = 10_000


class Classification:
    """Implements `tasks.task.Task`."""

    metric: str = "top1"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        require_model(config.model.name)
        require_batch(config.model.name, self._recipe.batch_size, self._recipe.crop)
        choose_loader(config.loader.name)
        self._data = ClassifiedData.of(config.data.model_dump())
        self.train_set, self.val_set = self._data.open_parts()
        if launched_as().rank == 0:
            print_notes(self.train_set, self.val_set)
            if shared := describe_shared(self.train_set, self.val_set):
                print(f"WARNING: {printable(shared)}", file=sys.stderr, flush=True)
        self.config = _fix_num_classes(config, self.train_set)
        self.classes = self.train_set.classes
        self.head: tuple[str, ...] = (find_head(config.model.name),)
        recipe, crop = self._recipe, cast(ClassificationEvalOptions, config.eval).crop
        self._transform = EvalTransform.of(crop, config.protocol, recipe.mean, recipe.std)
        self._dropblock: DropBlock | None = None
        self._frozen: list[nn.Module] = []
        self._class_weights: Tensor | None = None

    @property
    def _recipe(self) -> ClassificationRecipe:
        return cast(ClassificationRecipe, self.config.train)

    def identify(self, ranks: Ranks, tick: Callable[[], None]) -> dict[str, Any]:
        """See `Task`; it includes the protocol, because best accuracies are comparable only under the same protocol."""
        config = self.config
        return {
            "model.name": config.model.name,
            "model.num_classes": config.model.num_classes,
            "data.shuffle_shards": config.data.shuffle_shards,
            "data.val_split": self._data.val_split,
            "data.split_seed": None if self._data.val_split is None else self._data.split_seed,
            "evaluation": self._transform.protocol,
            "classes": list(self.classes),
            **describe_images({"training": self.train_set, "val": self.val_set}, config.data.digest, ranks, tick),
        }

    def count_kept_bytes(self, device: torch.device, enough: float = 0) -> int:
        """See `Task`."""
        recipe = self._recipe
        bound = recipe.batch_size * recipe.crop**2 * _BYTES_PER_PIXEL
        if bound < enough:
            return bound
        with autocast(device, recipe.precision):
            return count_kept(self.config.model.name, recipe.crop, recipe.batch_size, device)

    def build_model(self, is_new: bool, device: torch.device) -> nn.Module:
        """See `Task`."""
        recipe, options = self._recipe, self.config.model
        torch.manual_seed(self.config.seed)
        model = build_model(
            options.name,
            len(self.classes),
            recipe.dropout,
            recipe.zero_gamma,
            init=recipe.init,
            split_attention=options.split_attention,
        )
        if is_new and recipe.init_from is not None:
            self._start_from(model, recipe.init_from)
        model = place(model, device)
        self._frozen = freeze_stages(model, recipe.freeze)
        self._dropblock = DropBlock(model) if recipe.dropblock > 0 else None
        if recipe.drop_path > 0:
            add_drop_path(model, recipe.drop_path)
        if recipe.class_weights == "balanced":
            weights = balance_classes(self.train_set.labels, len(self.classes))
            self._class_weights = torch.from_numpy(weights).to(device)
        return model

    def _start_from(self, model: nn.Module, source: str) -> None:
        classes = list(self.classes)
        weights = read_weights(source)
        weights = replace(weights, classes=name_outputs(classes, weights.classes, len(classes)))
        same_classes = start_from(model, self.config.model.name, classes, weights)
        if launched_as().rank == 0:
            head = "its classifier too" if same_classes else f"with a new classifier of {len(classes)} classes"
            print(f"starting from {source}, {head}{self._compare_pixels(weights)}", flush=True)

    def _compare_pixels(self, weights: Weights) -> str:
        """Return a warning if the weights were trained with another normalisation; else ""."""
        before, now = (to_levels(other.mean, other.std) for other in (weights, self._recipe))
        if before == now:
            return ""
        values = " ".join(f"train.{name}={format_value(getattr(weights, name))}" for name in before)
        return f"; WARNING: it was trained with {values}"

    def plan_batches(self, num_batches: int, ranks: Ranks) -> BatchPlan:
        """See `Task`."""
        return BatchPlan(
            num_samples=len(self.train_set),
            batch_size=self._recipe.batch_size,
            num_batches=num_batches,
            rank=ranks.rank,
            world_size=ranks.world_size,
            shuffle=True,
            seed=self.config.seed,
            shard_sizes=self.train_set.shard_sizes,
            shuffle_shards=self.config.data.shuffle_shards or 0,
        )

    def choose_train_loader(self, device: torch.device, saved: str | None = None) -> str:
        """See `Task`."""
        name = self.config.loader.name
        if name == "auto" and saved is not None and (saved == "torchvision" or choose_loader(name) == "dali"):
            return saved
        return choose_loader(name, build_train_transform(self._recipe, self.config.seed).augmentation, device)

    def build_loader(self, plan: BatchPlan, ranks: Ranks) -> Loader:
        """See `Task`."""
        data, loader = self.config.data, self.config.loader
        transform = build_train_transform(self._recipe, self.config.seed)
        max_errors = data.max_errors if data.on_error == "substitute" else 0
        return build_loader(loader.name, self.train_set, plan, transform, ranks.device, loader.workers, max_errors)

    def build_evaluation(self, ranks: Ranks) -> Evaluate:
        """See `Task`."""
        options, images = self.config.loader, self.val_set
        plan = plan_evaluation(len(images), self._recipe.batch_size, ranks.rank, ranks.world_size)
        loader = build_loader(options.name, images, plan, self._transform, ranks.device, options.workers)

        def evaluate(model: nn.Module, pause: Pause) -> Score:
            folded = fold_batch_norms(model)
            evaluation = measure_accuracy(folded, loader, ranks, self._recipe.precision, pause, images.name)
            return self._describe_accuracy(evaluation)

        return evaluate

    def _describe_accuracy(self, evaluation: Evaluation) -> Score:
        top1, top5, count, protocol = evaluation.top1, evaluation.top5, evaluation.count, self._transform.protocol
        title = f"top-1 {top1:.2f} % of {count} images"
        figures = measure_classes(count_confusions(evaluation, len(self.classes)))
        top5_text = f", top-5 {top5:.2f} %" if len(self.classes) > TOP else ""
        return Score(
            values={
                "top1": top1,
                "top5": top5,
                "loss": evaluation.loss,
                "macro_precision": figures.macro_precision,
                "macro_recall": figures.macro_recall,
                "macro_f1": figures.macro_f1,
                "count": count,
                "crop": self._transform.crop,
                "protocol": protocol,
            },
            text=f"top-1 {top1:.2f} %{top5_text} of {count} images ({protocol})",
            pictures={"confusions": partial(draw_confusions, evaluation, self.classes, title)},
            files={"predictions.csv": partial(encode_predictions, self.val_set, [(protocol, evaluation)])},
        )

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Mix a batch, run the network under autocast, and return the cross entropy against smoothed targets."""
        recipe, (images, labels) = self._recipe, batch
        keep_in_evaluation(self._frozen)
        if self._dropblock:
            self._dropblock.set_probability(dropblock_probability(recipe, draws.epoch))
        images, mixing = erase_and_mix(images, recipe, draws)
        with autocast(images.device, recipe.precision):
            logits = network(images)
        targets = labels if mixing is None else mixing.mix_targets(one_hot(labels, logits.shape[1]))
        return {"cross_entropy": smoothed_cross_entropy(logits, targets, recipe.label_smoothing, self._class_weights)}

    def blank_batch(self, device: torch.device) -> Batch:
        """See `Task`; channels_last like the loaders' batches: otherwise a network would be compiled again."""
        recipe = self._recipe
        images = torch.zeros(recipe.batch_size, 3, recipe.crop, recipe.crop, device=device)
        labels = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)
        return images.to(memory_format=torch.channels_last), labels

    def show(self, batch: Batch, draws: Draws) -> Callable[[], np.ndarray]:
        """See `Task`; the images stay on the device until they are drawn."""
        images, _ = erase_and_mix(batch[0].clone(), self._recipe, draws)
        transform = self._transform
        return partial(draw_samples, images[:NUM_SHOWN].clone(), transform.mean, transform.std)

    def describe(self, counts_cost: bool) -> dict[str, str]:
        """See `Task`; multiply-adds are for 1000 classes."""
        name, crop, cost = self.config.model.name, self._recipe.crop, ""
        if counts_cost:
            cost = f", {count_cost(name, crop)[1] / 1e9:.2f} GFLOPs at {crop} with 1000 classes"
        train, val, root = len(self.train_set), len(self.val_set), self.config.data.root
        loader = self.choose_train_loader(choose_device(self.config.device))
        split = self._data.describe_split()
        chosen = f" by {split}" if split else ""
        return {
            "network": f"{name}, {len(self.classes)} classes{cost}",
            "data": f"{train:,} training and {val:,} val images in {root}{chosen}, read by {loader}",
            "images per class": describe_counts(self.train_set.labels, self.classes) + self._describe_weights(),
            "evaluation": self._transform.protocol,
        }

    def _describe_weights(self) -> str:
        if self._recipe.class_weights is None:
            return ""
        weights = balance_classes(self.train_set.labels, len(self.classes))
        return f"; images count {weights.max():.3g} times in the smallest class to {weights.min():.3g} in the largest"


def _fix_num_classes(config: TrainConfig, train_set: ImageSource) -> TrainConfig:
    """Set the classifier's width to the number of class folders."""
    num_classes = len(train_set.classes)
    if config.model.num_classes not in (None, num_classes):
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but {train_set.root} has {num_classes} classes"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": num_classes})})


def build_train_transform(recipe: ClassificationRecipe, seed: int) -> TrainTransform:
    """Return a recipe's transform of single images."""
    cropping: RandomResizedCrop | ERandomCrop = RandomResizedCrop(recipe.min_crop_area)
    if recipe.cropping == "erandom":
        cropping = ERandomCrop(recipe.crop, recipe.min_crop_area)
    augmentation = Augmentation(
        policy=recipe.policy, jitter=recipe.jitter, lighting=recipe.lighting, shift=recipe.pixel_shift
    )
    return TrainTransform(
        recipe.crop,
        seed,
        cropping,
        antialias=recipe.antialias,
        interpolation=recipe.interpolation,
        augmentation=augmentation,
        flip=0.5 if recipe.flips in ("horizontal", "both") else 0.0,
        vertical_flip=0.5 if recipe.flips in ("vertical", "both") else 0.0,
        **to_levels(recipe.mean, recipe.std),
    )


def dropblock_probability(recipe: ClassificationRecipe, epoch: int) -> float:
    """Return DropBlock's probability in an epoch, counted from 0: it rises linearly to the recipe's value (Gluon)."""
    assert recipe.epochs is not None
    return recipe.dropblock * (epoch + 1) / recipe.epochs


def erase_and_mix(images: Tensor, recipe: ClassificationRecipe, draws: Draws) -> tuple[Tensor, Mixing | None]:
    """Return a batch's images as the network sees them, and the mixing.

    Args:
        images: (B, 3, H, W), normalised; may be changed in place.
        recipe: of the training.
        draws: of the batch.
    """
    if recipe.erasing > 0:
        erase_rectangles(images, recipe.erasing, draws.stream(Purpose.ERASING))
    mixing = _draw_mixing(recipe, images, draws.stream(Purpose.MIXING))
    return images if mixing is None else mixing.mix_images(images), mixing


def _draw_mixing(recipe: ClassificationRecipe, images: Tensor, rng: np.random.Generator) -> Mixing | None:
    """Draw mixup or CutMix; if a recipe has both, either has probability 1/2."""
    mixup, cutmix = recipe.mixup_alpha > 0, recipe.cutmix_alpha > 0
    if mixup and cutmix:
        mixup = rng.random() < 0.5
    batch, size = len(images), images.shape[-1]
    if mixup:
        alpha, per_sample, partner = recipe.mixup_alpha, recipe.mixup_per_sample, recipe.mixup_partner
        return draw_mixup(alpha, per_sample, partner, batch, rng, images.device)
    if cutmix:
        return draw_cutmix(recipe.cutmix_alpha, recipe.mixup_partner, batch, size, rng, images.device)
    return None
