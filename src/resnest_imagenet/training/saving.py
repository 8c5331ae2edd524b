"""What a checkpoint of a run holds, and whether a run may go on from one."""

import hashlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.compute import name_device
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.loader import Loader, choose_loader
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.distributed import Ranks, gather, gather_objects
from resnest_imagenet.errors import CheckpointError, is_out_of_memory, printable
from resnest_imagenet.training.run_folder import RunFolder, list_versions
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState

# What an identity has of each part of the data; where one differs, those after it tell nothing new.
_OF_IMAGES = ("images", "labels", "sizes", "content")
_LOOKING_THREADS, _LOOKED_AT = 32, 256  # each waits for its own answer of a file server; and is given so many files


@dataclass(frozen=True)
class Saver:
    """Writes all that the future of a run depends on, and finds it again.

    Random numbers, the order of the images and the loaders' places are functions of the seed and the step
    (`randomness.py`): of them nothing has to be kept.

    Attributes:
        run: the folder.
        ranks: who takes part; rank 0 writes, and chooses what is read.
        identity: what must not change when a run goes on, by option name.
        circumstances: what may change, but then the result is no longer the same bit for bit.
        description: what readers of a checkpoint need besides: configuration and class names.
    """

    run: RunFolder
    ranks: Ranks
    identity: dict[str, Any]
    circumstances: dict[str, Any]
    description: dict[str, Any]

    def save(self, state: TrainingState, loader: Loader, is_best: bool) -> None:
        """Write a checkpoint; all ranks take part.

        Raises:
            StorageError: it cannot be written; the one before is still there.
        """
        content = {
            **state.state_dict(self.ranks),
            "bad_images": gather_objects(sorted(loader.substitution.bad), self.ranks),
            "identity": self.identity,
            "circumstances": self.circumstances,
            **self.description,
        }
        self.run.save(content, is_best)

    def find(self, on_mismatch: str) -> dict[str, Any] | None:
        """Return the newest checkpoint that is whole, the same on all ranks; None for a new run.

        Args:
            on_mismatch: what to do where it is of another run: "refuse", "set_aside", or "extend" if that has fewer
                epochs and is the same otherwise.

        Raises:
            CheckpointError: of another run, or none that is whole, or gone, or not there on all ranks.
        """
        name, remains = None, None
        saved: dict[str, Any] = {}
        if self.ranks.is_main:
            name, saved = self.run.read_newest()
            remains = self.run.find_remains() if name is None else None
        name, remains = gather_objects((name, remains), self.ranks)[0]
        path = None
        if name is not None:
            path = self.run.checkpoints / name
            if not path.exists():
                raise CheckpointError(f"{path}: not there: run_dir={self.run.path} is not shared by all ranks")
            saved = saved or load_checkpoint(path)
        problem = find_problem(self.run, path, saved, remains, self.identity, on_mismatch)
        if problem is None:
            return saved or None
        gather(0, self.ranks)  # all have read it
        if self.ranks.is_main:
            print(printable(f"{problem}: moved to {self.run.set_aside()}, starting from scratch"), flush=True)
        return None

    def restore(self, state: TrainingState, loader: Loader, saved: dict[str, Any]) -> bool:
        """Take over what `find` returned, and say what keeps the run from being the same bit for bit.

        Returns:
            Whether the run is finished, and nothing is left to do.

        Raises:
            CheckpointError: it holds something else, as that of another version may.
        """
        try:
            state.load_state_dict(saved, self.ranks)
            lists = saved["bad_images"]
            same_ranks = len(lists) == self.ranks.world_size
            bad = lists[self.ranks.rank] if same_ranks else itertools.chain.from_iterable(lists)
            loader.substitution.bad.update(bad)
            is_finished, before = is_over(self.run, saved, self.identity), _count_epochs(saved)
            changes = self._describe_changes(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{self.run.checkpoints}: not of this version, or not a run's") from error
        # Not above: where another rank is lost, that is no fault of the checkpoint.
        is_finished = gather_objects(is_finished, self.ranks)[0]
        if is_finished:
            lines = [f"finished: best top-1 {state.best_top1:.2f} %, nothing to do"]
        else:
            lines = [f"resuming after step {state.step}, {state.epoch} epochs done", *changes]
        if self.ranks.is_main:
            print(*lines, sep="\n", flush=True)
        if before != self.identity["train.epochs"]:
            state.history.append({"epochs": before, "until_step": state.step})
        return is_finished

    def _describe_changes(self, saved: dict[str, Any]) -> list[str]:
        """Return a line for each thing that is not as it was when a checkpoint was written, or may not be."""
        lines = []
        before, now = _count_epochs(saved), self.identity["train.epochs"]
        if before != now:
            lines.append(f"extended from {before} to {now} epochs: from here on the schedule is that of {now} epochs")
        unknown = [name for name in self.identity if _is_of_images(name) and name not in saved["identity"]]
        if unknown:
            lines.append(f"not compared, as the checkpoint does not tell them: {', '.join(unknown)}")
        circumstances = saved["circumstances"]
        changed = [
            f"{name} {circumstances.get(name)} -> {value}"
            for name, value in self.circumstances.items()
            if circumstances.get(name) != value
        ]
        if changed:
            lines.append(f"the images left of the epoch are seen once each, but not bit for bit: {', '.join(changed)}")
        return lines


def find_problem(
    run: RunFolder,
    newest: Path | None,
    saved: dict[str, Any],
    remains: str | None,
    identity: dict[str, Any],
    on_mismatch: str,
) -> str | None:
    """Return why what a folder holds is to be set aside, in words; None where a run may resume, or begin, there.

    Args:
        run: the folder.
        newest: its newest checkpoint; None: there is none.
        saved: the content of that.
        remains: what `RunFolder.find_remains` returns where there is none.
        identity: of the run that is to start.
        on_mismatch: as in `Saver.find`.

    Raises:
        CheckpointError: the folder holds another run or what is left of one, and `on_mismatch` is not "set_aside".
    """
    ways = ["choose another run_dir", "checkpoint.on_mismatch=set_aside to start from scratch in this one"]
    if newest is None:
        if remains is None:
            return None
        problem = f"{run.checkpoints}: the checkpoints of the run in this folder are gone ({remains})"
        ways.insert(0, "put them back")
    else:
        differences = compare_identity(saved, identity)
        is_longer = [*differences] == ["train.epochs"] and 0 < _count_epochs(saved) < identity["train.epochs"]
        if not differences or (is_longer and on_mismatch == "extend"):
            return None
        problem = f"{newest} was trained with {'; '.join(differences.values())}"
        if is_longer:
            ways.insert(1, "checkpoint.on_mismatch=extend to train this one longer")
        elif on_mismatch == "extend":
            problem += " (on_mismatch=extend is for more epochs, and for nothing else)"
    if on_mismatch == "set_aside":
        return problem
    raise CheckpointError(f"{problem}: {', '.join(ways[:-1])}, or {ways[-1]}")


def is_over(run: RunFolder, saved: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Say whether the run of a checkpoint has finished, and has said so."""
    return saved["epoch"] >= identity["train.epochs"] and run.read_status().get("state") == "finished"


def compare_identity(saved: dict[str, Any], identity: dict[str, Any]) -> dict[str, str]:
    """Return how the run of a checkpoint differs from another, in words by what differs.

    Of the data only that is compared which the checkpoint tells.
    """
    before = {"classes": saved.get("classes"), **_read_identity(saved)}
    differences: dict[str, str] = {}
    for name, value in identity.items():
        old = _locate(before.get(name)) if name == "train.init_from" else before.get(name)
        if old == value:
            continue
        if name == "classes":
            differences[name] = _compare_classes(old, value)
        elif not _is_of_images(name):
            differences[name] = f"{name}={old}, not {value}"
        elif name in before and not any(_is_of_images(other, name.partition(" ")[0]) for other in differences):
            differences[name] = _compare_images(name, str(old), value)
    return differences


def _read_identity(saved: dict[str, Any]) -> dict[str, Any]:
    identity = saved.get("identity")
    return identity if isinstance(identity, dict) else {}


def _count_epochs(saved: dict[str, Any]) -> int:
    """Return how many epochs the run of a checkpoint was to have; 0: it does not tell."""
    epochs = _read_identity(saved).get("train.epochs")
    return epochs if isinstance(epochs, int) else 0


def _is_of_images(name: str, part: str | None = None) -> bool:
    """Say whether an entry of an identity is about the images, of one part of the data set where that is given."""
    of, _, what = name.partition(" ")
    return what in _OF_IMAGES and part in (of, None)


def _compare_images(name: str, old: str, new: str) -> str:
    part, _, what = name.partition(" ")
    before, now = old.partition(" ")[0], new.partition(" ")[0]
    if what == "images":
        return f"{part} images {before} -> {now}" if before != now else f"{now} {part} images of other names"
    if what == "sizes":
        return f"{part} images of other sizes ({before} -> {now} bytes)"
    return f"{part} images of other {what}"


def _compare_classes(old: Any, new: list[str]) -> str:
    if not isinstance(old, list) or len(old) != len(new):
        return f"classes {len(old) if isinstance(old, list) else 'unknown'} -> {len(new)}"
    if sorted(old) == sorted(new):
        return "the classes in another order"
    label = next(label for label, name in enumerate(new) if name != old[label])
    return f"class {label} {old[label]} -> {new[label]}"


def describe_identity(
    config: TrainConfig,
    plan: StepPlan,
    train_set: ImageSource,
    val_set: ImageSource,
    protocol: str,
    ranks: Ranks,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return what must not change when a run resumes: plain values by option name, and digests of the data.

    The evaluation's protocol and the val images are among them: the best accuracy so far is comparable under the same
    only. Paths are relative to the data set's folder, which may move. All ranks take part, and share the files.

    Args:
        config: of the run.
        plan: its steps.
        train_set: its training images.
        val_set: the images of its evaluations.
        protocol: of its evaluations, in words.
        ranks: who takes part.
        tick: called from time to time while the files are looked at, as data.digest asks for.
    """
    recipe = config.train.model_dump()
    # The number of ranks and with it the batch may change as long as the global batch stays; the others leave the run
    # what it is.
    for name in ("recipe", "batch_size", "global_batch", "compile", "max_skipped_steps"):
        del recipe[name]
    recipe["init_from"] = _locate(config.train.init_from)
    parts = {"training": train_set, "val": val_set}
    files: dict[str, str] = {}
    for name, images in parts.items() if config.data.digest != "names" else ():
        sizes = _look_at(images, images.list_sizes, ranks, tick)
        files[f"{name} sizes"] = f"{sizes.sum()} {_digest(sizes)}"
    for name, images in parts.items() if config.data.digest == "content" else ():
        files[f"{name} content"] = _digest(_look_at(images, partial(_digest_images, images), ranks, tick))
    return {
        "model.name": config.model.name,
        "model.num_classes": config.model.num_classes,
        **{f"train.{name}": value for name, value in recipe.items()},
        "train.global_batch": plan.global_batch,
        "seed": config.seed,
        "data.shuffle_shards": config.data.shuffle_shards,
        "evaluation": protocol,
        "classes": list(train_set.classes),
        **{f"{name} images": f"{len(images)} {_digest(images.files)}" for name, images in parts.items()},
        **{f"{name} labels": _digest(images.labels) for name, images in parts.items()},
        **files,
    }


def _locate(init_from: str | None) -> str | None:
    """Return the absolute path of a file, without links; the name of published weights as it is."""
    if not isinstance(init_from, str) or init_from.startswith(("official:", "timm:")):
        return init_from
    return os.path.realpath(init_from)


def _look_at(
    images: ImageSource, look: Callable[[np.ndarray], np.ndarray], ranks: Ranks, tick: Callable[[], None]
) -> np.ndarray:
    """Return what `look` returns for the indices of all images, (N, ...); each rank looks at its share."""
    share = np.arange(len(images))[ranks.rank :: ranks.world_size]
    looked = []
    with ThreadPoolExecutor(_LOOKING_THREADS) as pool:
        for values in pool.map(look, np.array_split(share, 1 + len(share) // _LOOKED_AT)):
            looked.append(values)
            tick()
    shares = gather_objects(np.concatenate(looked), ranks)
    whole = np.empty((len(images), *shares[0].shape[1:]), shares[0].dtype)
    for rank, values in enumerate(shares):
        whole[rank :: ranks.world_size] = values
    return whole


def _digest_images(images: ImageSource, indices: np.ndarray) -> np.ndarray:
    """Return the digests of n images, uint8 (n, 32)."""
    digests = b"".join(_digest_image(images, index) for index in indices.tolist())
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


def _digest_image(images: ImageSource, index: int) -> bytes:
    try:
        return hashlib.sha256(images.read(index)).digest()
    except (BadImage, OSError):  # the loaders name it
        return bytes(32)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def describe_circumstances(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return what may change when a run is resumed, but then the result is no longer the same bit for bit."""
    return {
        "ranks": ranks.world_size,
        "train.batch_size": config.train.batch_size,
        "train.compile": config.train.compile,
        "model.split_attention": config.model.split_attention,
        "loader": choose_loader(config.loader.name),
        "device": name_device(ranks.device),
        **list_versions(),
    }
