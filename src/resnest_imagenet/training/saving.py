"""What a checkpoint of a run holds, and whether a run may go on from one."""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.compute import name_device
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.loader import Loader, choose_loader
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.distributed import Ranks, gather, gather_objects
from resnest_imagenet.errors import CheckpointError, is_out_of_memory
from resnest_imagenet.training.run_folder import RunFolder, list_versions
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState


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
            on_mismatch: what to do where it is of another run: "refuse", or "set_aside".

        Raises:
            CheckpointError: of another run, or none that is whole, or not there on all ranks.
        """
        name, saved = self.run.read_newest() if self.ranks.is_main else (None, {})
        name = gather_objects(name, self.ranks)[0]
        if name is None:
            return None
        path = self.run.checkpoints / name
        if not path.exists():
            raise CheckpointError(f"{path}: not there: run_dir={self.run.path} is not shared by all ranks")
        saved = saved or load_checkpoint(path)
        differences = compare_identity(saved, self.identity)
        if not differences:
            return saved
        line = f"{path} was trained with {differences}"
        if on_mismatch == "refuse":
            raise CheckpointError(
                f"{line}: choose another run_dir, or checkpoint.on_mismatch=set_aside to start anew in this one"
            )
        gather(0, self.ranks)  # all have read it
        if self.ranks.is_main:
            print(f"{line}: moved to {self.run.set_aside()}, starting anew", flush=True)
        return None

    def restore(self, state: TrainingState, loader: Loader, saved: dict[str, Any]) -> None:
        """Take over what `find` returned, and say what keeps the run from being the same bit for bit.

        Raises:
            CheckpointError: it holds something else, as that of another version may.
        """
        try:
            self._restore(state, loader, saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{self.run.checkpoints}: not of this version, or not a run's") from error

    def _restore(self, state: TrainingState, loader: Loader, saved: dict[str, Any]) -> None:
        state.load_state_dict(saved, self.ranks)
        lists = saved["bad_images"]
        same_ranks = len(lists) == self.ranks.world_size
        loader.substitution.bad.update(lists[self.ranks.rank] if same_ranks else itertools.chain.from_iterable(lists))
        if not self.ranks.is_main:
            return
        print(f"going on after step {state.step}, {state.epoch} epochs done", flush=True)
        before, now = saved["circumstances"], self.circumstances
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
        if changed:
            print(
                f"the images left of the epoch are seen once each, but not bit for bit: {', '.join(changed)}",
                flush=True,
            )


def compare_identity(saved: dict[str, Any], identity: dict[str, Any]) -> str:
    """Return in words how the run of a checkpoint differs from another; "" where it does not."""
    theirs = saved.get("identity")
    theirs = theirs if isinstance(theirs, dict) else {}
    changed = [option for option, value in identity.items() if theirs.get(option) != value]
    return "; ".join(f"{option}={theirs.get(option)}, not {identity[option]}" for option in changed)


def describe_identity(config: TrainConfig, plan: StepPlan, train_set: ImageSource, protocol: str) -> dict[str, Any]:
    """Return what must not change when a run goes on: plain values by option name, and a digest of the file names.

    The evaluation's protocol is one of them: the best accuracy so far is comparable under the same only.
    """
    recipe = config.train.model_dump()
    # The number of ranks and with it the batch may change as long as the global batch stays; the others leave the run
    # what it is.
    for name in ("batch_size", "global_batch", "compile", "max_skipped_steps"):
        del recipe[name]
    return {
        "model.name": config.model.name,
        "model.num_classes": config.model.num_classes,
        **{f"train.{name}": value for name, value in recipe.items()},
        "train.global_batch": plan.global_batch,
        "seed": config.seed,
        "data.shuffle_shards": config.data.shuffle_shards,
        "evaluation": protocol,
        "training images": f"{len(train_set)} {hashlib.sha256(train_set.files.tobytes()).hexdigest()[:16]}",
    }


def describe_circumstances(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return what may change when a run goes on, but then the result is no longer the same bit for bit."""
    return {
        "ranks": ranks.world_size,
        "train.batch_size": config.train.batch_size,
        "train.compile": config.train.compile,
        "model.split_attention": config.model.split_attention,
        "loader": choose_loader(config.loader.name),
        "device": name_device(ranks.device),
        **list_versions(),
    }
