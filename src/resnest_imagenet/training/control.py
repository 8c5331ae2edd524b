"""Everything around the steps of a run: the other ranks, requests to stop, saving."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks, barrier, gather
from resnest_imagenet.errors import LoadingError, Stopped
from resnest_imagenet.supervision import EVALUATING, SAVING, Watch
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.log import RunLog
from resnest_imagenet.training.saving import Saver
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.stopping import StopRequest

BATCHES_BETWEEN_ASKING = 10  # in an evaluation; in training the ranks exchange stop requests at every step


class StopAgreed(Exception):  # noqa: N818 - not an error
    """All ranks have agreed to stop at a point where they can save."""


@dataclass(frozen=True)
class Control:
    """Everything around the steps.

    Attributes:
        ranks: the ranks of the run.
        watch: notices a rank that hangs.
        request: whether this rank was asked to stop.
        health: judges each step.
        log: reports the run.
        saver: writes checkpoints.
        steps_between_saves: within an epoch.
    """

    ranks: Ranks
    watch: Watch
    request: StopRequest
    health: Health
    log: RunLog
    saver: Saver
    steps_between_saves: int

    def read_verdicts(self, unread: int = 0) -> bool:
        """Read the verdicts on finished steps and report skipped ones; return whether the ranks agree to stop.

        Args:
            unread: how many of the newest verdicts to leave for later.

        Raises:
            NonFiniteError: on all ranks; no rank has applied the step.
        """
        stops = False
        for verdict in self.health.read_verdicts(unread):
            stops |= verdict.stops
            if verdict.is_skipped:
                self.log.skipped(verdict)
        return stops

    def is_save_due(self, state: TrainingState) -> bool:
        """Return whether to save after a step within an epoch."""
        return state.step % self.steps_between_saves == 0

    def save(self, state: TrainingState, loader: Loader, is_best: bool = False) -> None:
        """Write a checkpoint; all ranks take part.

        Raises:
            NonFiniteError: the verdict on the last step was not read yet; nothing is written.
        """
        self.read_verdicts()
        self.watch.then(SAVING)
        self.log.synchronise()
        self.saver.save(state, loader, is_best)

    def before_eval_batch(self, epoch: int, first: int, batch: int, is_everywhere: bool) -> None:
        """Note the progress of an evaluation, and end it if the ranks agree to stop.

        Args:
            epoch: epochs done.
            first: number of training batches before it.
            batch: number of the batch on this rank.
            is_everywhere: whether every rank has a batch of this number.

        Raises:
            StopAgreed: on all ranks.
        """
        self.watch.at(epoch, first + batch, EVALUATING)
        if not is_everywhere or batch % BATCHES_BETWEEN_ASKING:
            return
        if any(gather(int(self.request.name is not None), self.ranks)):
            raise StopAgreed

    @contextmanager
    def saving_before_leaving(self, state: TrainingState, loader: Loader) -> Iterator[None]:
        """Save and end the run if the ranks agree to stop, or if the storage does not return this rank's images.

        Raises:
            Stopped: the ranks have agreed to stop.
            LoadingError: the error of the storage.
        """
        try:
            yield
        except StopAgreed:
            self.request.agree()
            self.save(state, loader)
            barrier(self.ranks)  # no rank ends before the checkpoint is written
            raise Stopped(f"stopped after step {state.step}; the same command resumes the run") from None
        except LoadingError:
            # With other ranks, which wait at another point, saving is not possible: the last checkpoint stays the last.
            if state.step > 0 and self.ranks.world_size == 1:
                self.save(state, loader)
            raise
