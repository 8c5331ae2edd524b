"""Worker processes over a plan: what the loaders of all tasks share.

Workers read, decode and transform; the process that trains or evaluates takes whole batches from them. A worker's death
and a storage that fails are errors with one line, and another sample stands in for one that cannot be used.
"""

import errno
import gc
import os
import re
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from resnest_imagenet.data.decoding import BadImage, Fault
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.processes import end_with_parent
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.errors import LoadingError, StorageError, explain_runtime


class Samples(Dataset[Any], ABC):
    """The samples of a set, by (epoch, index): in the worker processes, each with the index of what was used for it."""

    def __init__(self, substitution: Substitution) -> None:
        self.substitution = substitution

    @abstractmethod
    def read(self, index: int) -> Any:
        """Return a sample, decoded.

        Raises:
            BadImage: it cannot be used.
            LoadingError: the storage fails.
        """

    @abstractmethod
    def transform(self, content: Any, epoch: int, index: int, used: int) -> Any:
        """Return what a batch holds of a sample: what `collate` takes, the same kind for all.

        Args:
            content: what `read(used)` returned.
            epoch: counted from 0.
            index: of the sample in the plan: its random draws are this one's.
            used: of what is used: its labels are this one's.
        """

    def collate(self, contents: list[Any]) -> Any:
        """Return what a batch is of what `transform` returned; by default torch's `default_collate` of it."""
        return default_collate(contents)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        content, used = self.load(index)
        return self.transform(content, epoch, index, used), used

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any] | BadImage | LoadingError:
        """Return the samples of a batch; an error as a value: torch would make another of its text."""
        try:
            return [self[key] for key in keys]
        except (BadImage, LoadingError) as error:
            return error

    def load(self, index: int) -> tuple[Any, int]:
        """Return a sample or what stands in for it, and the index of the one it is.

        Raises:
            BadImage: none of them can be used.
            LoadingError: the storage fails.
        """
        fault: Exception | None = None
        for used in self.substitution.candidates(index):
            try:
                return self.read(used), used
            except BadImage as error:
                fault = error
        raise BadImage(Fault("damaged", f"image {index}: bad, and so is what may stand in for it")) from fault


class _Keys:
    """The batch sampler: an epoch's batches of (epoch, index), set before each pass."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.plan.batches(self.epoch, self.start):
            yield [(self.epoch, index) for index in indices.tolist()]


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any] | BadImage | LoadingError) -> Any:
    if not isinstance(samples, list):
        return samples
    contents, used = zip(*samples, strict=True)
    return collate(list(contents)), torch.tensor(used)


def _set_up_worker(parent: int, worker: int) -> None:
    """Make a worker deaf to the signals by which schedulers, terminals and torchrun stop a whole group of processes.

    The parent decides: without its workers it could not finish the step that it stops after. With it they end.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)


def _kill(workers: list[BaseProcess]) -> None:
    """End workers before multiprocessing does at exit: it would ask them with SIGTERM, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a failure
    for worker in workers:
        worker.kill()


def _explain_failure(error: Exception) -> LoadingError | None:
    """Explain why workers cannot be started, have died or cannot hand over a batch; None for any other failure."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    # A batch is fetched from its worker's memory: that, too, tells that it is gone.
    is_gone = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
    if is_gone or re.search(r"(DataLoader worker|Pin memory thread).* (exited unexpectedly|is killed by signal)", text):
        what = "a worker process of the loader has died (killed, or short of memory, /dev/shm or open files?)"
        return LoadingError(errno.ECHILD, f"{what}: lower loader.workers, --ipc=host, or loader.workers=0")
    if number in (errno.EAGAIN, errno.ENOMEM):
        return LoadingError(number, f"the loader's workers cannot be started ({text}): lower loader.workers")
    explained = explain_runtime(error)
    return LoadingError(number or errno.EIO, str(explained)) if isinstance(explained, StorageError) else None


class WorkerLoader:
    """The batches of a plan, in the memory of this process, from worker processes of torch's DataLoader."""

    def __init__(self, samples: Samples, plan: BatchPlan, device: torch.device, workers: int) -> None:
        self.plan = plan
        self._samples = samples
        self._keys = _Keys(plan)
        self._device, self._num_workers = device, workers
        self._loader = self._build_loader()
        self._workers: list[BaseProcess] = []
        Finalize(None, _kill, [self._workers], exitpriority=0)

    def _build_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._samples,
            batch_sampler=self._keys,
            num_workers=self._num_workers,
            # Forked workers see it when their parent is killed; those of a fork server would stay.
            multiprocessing_context="fork" if self._num_workers and sys.platform == "linux" else None,
            persistent_workers=self._num_workers > 0,
            worker_init_fn=partial(_set_up_worker, os.getpid()),
            collate_fn=partial(_collate, self._samples.collate),
            pin_memory=self._device.type == "cuda",
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield what `Samples.collate` returns, from the rank's `start`-th batch of the epoch on.

        Raises:
            DataError: for a sample that cannot be used and may not be replaced.
            LoadingError: the storage fails, or a worker has died.
        """
        self._keys.epoch, self._keys.start = epoch, start
        # Frozen objects are not collected: a forked worker that collected the parent's garbage would run destructors
        # there, and one that waits for a thread, as DALI's do, would wait for ever.
        gc.freeze()
        others = active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            batches = iter(self._loader)
        except OSError as error:
            raise (_explain_failure(error) or error) from error
        finally:
            gc.unfreeze()
        if threading.current_thread() is threading.main_thread():
            # torch's own would raise anywhere, in the middle of a step: `next` finds a dead worker, too.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._workers += [child for child in active_children() if child not in others]
        for indices in self.plan.batches(epoch, start):
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                raise (_explain_failure(error) or error) from error
            if isinstance(batch, BadImage | LoadingError):
                # The workers end here. In a cycle, which the exception may become a part of, torch would wait 5 s for
                # each when the garbage is collected, and then leave it running.
                del batches
                self._loader = self._build_loader()
                if isinstance(batch, BadImage):
                    self._explain(indices)
                raise batch
            content, used = batch
            for index, used_index in zip(indices.tolist(), used.tolist(), strict=True):
                self._samples.substitution.record(index, used_index)
            yield content

    def _explain(self, indices: np.ndarray) -> None:
        """Raise a DataError with the image that cannot be used, nor what may stand in for it."""
        for index in indices.tolist():
            used: int | None = None
            with suppress(BadImage):
                _, used = self._samples.load(index)
            self._samples.substitution.record(index, used)
