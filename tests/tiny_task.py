"""A task of a millisecond a step, for the tests of what surrounds the steps: two groups of numbers, told apart.

`register()` makes it `train.task=tiny`; as a program, `python -m tiny_task ...`, it is resnest-train with this task.
"""

import csv
import io
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnest_imagenet.compute import autocast
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.distributed import Ranks, sum_over_ranks
from resnest_imagenet.evaluation.score import Score
from resnest_imagenet.extensions import register_task
from resnest_imagenet.randomness import Draws, Purpose, uniform_rows
from resnest_imagenet.recipe import ClassificationRecipe
from resnest_imagenet.tasks.digests import describe_images
from resnest_imagenet.tasks.task import Evaluate, Pause

WIDTH = 8  # numbers in a sample
NUM_TRAIN, NUM_VAL = 103, 40  # as many as the demo's images in the tests

Batch = tuple[Tensor, Tensor]  # numbers float32 (B, WIDTH); labels int64 (B,)


class TinySource(ImageSource):
    """Samples without files: all that is in them is a function of their index."""

    def list_sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), 4 * WIDTH)

    def name(self, index: int) -> str:
        return f"sample {index}"

    def fetch(self, index: int) -> bytes:
        return self.files[index]


def make_source(part: str, count: int) -> TinySource:
    """List the samples of one part of the data set."""
    files = np.array([f"{part} {index}".encode() for index in range(count)])
    return TinySource(Path(part), ("even", "odd"), files, np.arange(count) % 2)


class TinyNetwork(nn.Sequential):
    """Linear, BN, ReLU, dropout, linear: with buffers, which a skipped step must restore, and with draws."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.add_module("stem", nn.Linear(WIDTH, 16))
        self.add_module("norm", nn.BatchNorm1d(16))
        self.add_module("relu", nn.ReLU())
        self.add_module("dropout", nn.Dropout(dropout))
        self.add_module("head", nn.Linear(16, 2))


class TinyLoader:
    """Implements `data.loader.Loader`."""

    def __init__(self, images: ImageSource, plan: BatchPlan, ranks: Ranks, config: TrainConfig, bad: Collection[int]):
        self.plan = plan
        max_errors = config.data.max_errors if config.data.on_error == "substitute" else 0
        self.substitution = Substitution(images, max_errors)
        self._labels, self._bad = images.labels, bad
        self._seed, self._device = config.seed, ranks.device
        rng = np.random.default_rng(len(images))
        self._numbers = rng.standard_normal((len(images), WIDTH)) + images.labels[:, None]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the samples of the plan; those of training with noise that is drawn for the epoch and the sample."""
        for indices in self.plan.batches(epoch, start):
            used = np.array([self._use(index) for index in indices.tolist()])
            numbers = self._numbers[used]
            if self.plan.shuffle:
                numbers = numbers + uniform_rows(self._seed, Purpose.CROP, epoch, indices.tolist(), WIDTH)
            yield (
                torch.from_numpy(numbers.astype(np.float32)).to(self._device),
                torch.from_numpy(self._labels[used]).to(self._device),
            )

    def _use(self, index: int) -> int:
        """Return the sample that stands for one: itself, unless it is bad."""
        used = next((other for other in self.substitution.candidates(index) if other not in self._bad), None)
        self.substitution.record(index, used)
        assert used is not None
        return used


class TinyTask:
    """Implements `tasks.task.Task`.

    The options are those of classification, of which the ones about images do nothing; mixup mixes the numbers.
    """

    metric = "accuracy"
    head: tuple[str, ...] = ("head",)

    def __init__(
        self, config: TrainConfig, *, bad: Collection[int] = (), num_parts: int = 1, num_train: int = NUM_TRAIN
    ) -> None:
        """Open the task.

        Args:
            config: the run's.
            bad: training samples that cannot be read.
            num_parts: of the loss: 1, or 2.
            num_train: size of the training set.
        """
        self.config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 2})})
        self.train_set, self.val_set = make_source("train", num_train), make_source("val", NUM_VAL)
        self.classes = self.train_set.classes
        self._bad, self._num_parts = bad, num_parts

    def identify(self, ranks: Ranks, tick: Callable[[], None]) -> dict[str, Any]:
        sets = {"training": self.train_set, "val": self.val_set}
        return {
            "evaluation": "argmax",
            "classes": list(self.classes),
            **describe_images(sets, self.config.data.digest, ranks, tick),
        }

    def count_kept_bytes(self, device: torch.device, enough: float = 0) -> int:
        return self.config.train.batch_size * 4 * (WIDTH + 3 * 16)

    def build_model(self, is_new: bool, device: torch.device) -> nn.Module:
        torch.manual_seed(self.config.seed)
        return TinyNetwork(self.config.train.dropout).to(device)

    def plan_batches(self, num_batches: int, ranks: Ranks) -> BatchPlan:
        return BatchPlan(
            num_samples=len(self.train_set),
            batch_size=self.config.train.batch_size,
            num_batches=num_batches,
            rank=ranks.rank,
            world_size=ranks.world_size,
            shuffle=True,
            seed=self.config.seed,
        )

    def choose_train_loader(self, device: torch.device, saved: str | None = None) -> None:
        pass

    def build_loader(self, plan: BatchPlan, ranks: Ranks) -> TinyLoader:
        return TinyLoader(self.train_set, plan, ranks, self.config, self._bad)

    def build_evaluation(self, ranks: Ranks) -> Evaluate:
        plan = plan_evaluation(NUM_VAL, self.config.train.batch_size, ranks.rank, ranks.world_size)
        loader = TinyLoader(self.val_set, plan, ranks, self.config, ())
        return partial(self._evaluate, loader, ranks)

    @torch.inference_mode()
    def _evaluate(self, loader: TinyLoader, ranks: Ranks, model: nn.Module, pause: Pause) -> Score:
        model.eval()
        seen, answers = torch.zeros(2, NUM_VAL, dtype=torch.int64, device=ranks.device)
        num_common = loader.plan.num_batches // ranks.world_size
        samples = loader.plan.batches(0)
        for batch, ((numbers, _), indices) in enumerate(zip(loader.batches(0), samples, strict=True)):
            pause(batch, batch < num_common)
            seen[indices] += 1
            answers[indices] = model(numbers).argmax(1)
        seen, answers = sum_over_ranks(torch.stack([seen, answers])).cpu().numpy()
        assert (seen == 1).all()
        accuracy = 100 * float((answers == self.val_set.labels).mean())
        return Score(
            values={"accuracy": accuracy, "count": NUM_VAL},
            text=f"accuracy {accuracy:.2f} % of {NUM_VAL} samples",
            pictures={"answers": partial(draw_answers, answers)},
            files={"answers.csv": partial(encode_answers, self.val_set, answers)},
        )

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        numbers, labels = batch
        rng = draws.stream(Purpose.MIXING)
        weight = float(rng.beta(self.config.train.mixup_alpha, 1)) if self.config.train.mixup_alpha else 1.0
        mixed = weight * numbers + (1 - weight) * numbers.flip(0)
        with autocast(numbers.device, self.config.train.precision):
            logits = network(mixed)
        right, other = (F.cross_entropy(logits.float(), targets) for targets in (labels, labels.flip(0)))
        parts = {"cross_entropy": weight * right + (1 - weight) * other}
        if self._num_parts == 2:
            parts["size"] = 0.01 * logits.float().square().mean()
        return parts

    def blank_batch(self, device: torch.device) -> Batch:
        count = self.config.train.batch_size
        return torch.zeros(count, WIDTH, device=device), torch.zeros(count, dtype=torch.int64, device=device)

    def show(self, batch: Batch, draws: Draws) -> Callable[[], np.ndarray]:
        return partial(draw_numbers, batch[0].clone())

    def describe(self, counts_cost: bool) -> dict[str, str]:
        return {
            "network": f"tiny, {len(self.classes)} classes",
            "data": f"{len(self.train_set)} training and {len(self.val_set)} val samples",
        }


def draw_numbers(numbers: Tensor) -> np.ndarray:
    """Draw a row of grey pixels for each sample, uint8 (B, WIDTH, 3)."""
    grey = (numbers * 40 + 128).clamp(0, 255).to(torch.uint8).cpu().numpy()
    return np.repeat(grey[..., None], 3, axis=2)


def draw_answers(answers: np.ndarray) -> np.ndarray:
    """Draw a pixel for each answer, uint8 (1, N, 3)."""
    return np.repeat((answers * 255).astype(np.uint8)[None, :, None], 3, axis=2)


def encode_answers(images: ImageSource, answers: np.ndarray) -> bytes:
    """Return a CSV file with a line for each sample: its name, and the answer."""
    text = io.StringIO()
    csv.writer(text).writerows(zip(map(images.name, range(len(images))), answers.tolist(), strict=True))
    return text.getvalue().encode()


_variant: Callable[[TrainConfig], TinyTask] = TinyTask


def open_variant(config: TrainConfig) -> TinyTask:
    """Open the variant that was registered last."""
    return _variant(config)


def register(build: Callable[..., TinyTask] = TinyTask, **options: Any) -> None:
    """Register the task, or a variant of it, with options of `TinyTask`."""
    global _variant  # noqa: PLW0603 - a name stands for one function
    _variant = partial(build, **options)
    register_task("tiny", open_variant, ClassificationRecipe)


if __name__ == "__main__":
    from resnest_imagenet.commands.train import main

    register()
    main()
