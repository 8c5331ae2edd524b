"""Worker processes over a plan, shared by the loaders of all tasks.

Workers read, decode and transform; the process that trains or evaluates gets whole batches from them. A dead worker or
a failing storage is an error of one line. A sample that cannot be used is replaced by another one.
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
    """The samples of a set by (epoch, index), in the worker processes; each comes with the index of the sample used."""

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
        """Return a sample's part of a batch, as `collate` takes it.

        Args:
            content: the result of `read(used)`.
            epoch: counted from 0.
            index: of the sample in the plan; the random draws are this sample's.
            used: of the sample that is used; the labels are this sample's.
        """

    def collate(self, contents: list[Any]) -> Any:
        """Make a batch of the results of `transform`; by default with torch's `default_collate`."""
        return default_collate(contents)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        content, used = self.load(index)
        return self.transform(content, epoch, index, used), used

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any] | BadImage | LoadingError:
        """Return the samples of a batch, or an error as a value: torch would raise another one with its text."""
        try:
            return [self[key] for key in keys]
        except (BadImage, LoadingError) as error:
            return error

    def load(self, index: int) -> tuple[Any, int]:
        """Return a sample or its replacement, and the index of the sample that it is.

        Raises:
            BadImage: no candidate can be used.
            LoadingError: the storage fails.
        """
        fault: Exception | None = None
        for used in self.substitution.candidates(index):
            try:
                return self.read(used), used
            except BadImage as error:
                fault = error
        message = f"image {index} cannot be used, nor can any image that may replace it"
        raise BadImage(Fault("damaged", message)) from fault


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
    """Ignore the signals with which schedulers, terminals and torchrun stop a whole group of processes.

    The parent handles them, and needs its workers to finish its last step. The workers end with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)


def _kill(workers: list[BaseProcess]) -> None:
    """Kill workers before multiprocessing's own exit handler, which would send SIGTERM and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a failure
    for worker in workers:
        worker.kill()


def _explain_failure(error: Exception) -> LoadingError | None:
    """Explain why workers cannot be started, have died or cannot hand over a batch; None for any other failure."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    # A batch is fetched from its worker's memory: these errors also mean that the worker has died.
    is_dead = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
    if is_dead or re.search(r"(DataLoader worker|Pin memory thread).* (exited unexpectedly|is killed by signal)", text):
        cause = "a worker process of the loader has died (killed, or short of memory, /dev/shm or open files?)"
        return LoadingError(errno.ECHILD, f"{cause}: lower loader.workers, --ipc=host, or loader.workers=0")
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
            # Forked workers end when their parent is killed; those of a fork server would stay.
            multiprocessing_context="fork" if self._num_workers and sys.platform == "linux" else None,
            persistent_workers=self._num_workers > 0,
            worker_init_fn=partial(_set_up_worker, os.getpid()),
            collate_fn=partial(_collate, self._samples.collate),
            pin_memory=self._device.type == "cuda",
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield what `Samples.collate` returns, from the rank's `start`-th batch of the epoch on.

        Raises:
            DataError: a sample cannot be used and must not be replaced.
            LoadingError: the storage fails, or a worker has died.
        """
        self._keys.epoch, self._keys.start = epoch, start
        # Frozen objects are not collected. Otherwise a forked worker could collect the parent's garbage and run its
        # destructors; one that waits for a thread, as DALI's do, would wait forever.
        gc.freeze()
        earlier_children = active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            batches = iter(self._loader)
        except OSError as error:
            raise (_explain_failure(error) or error) from error
        finally:
            gc.unfreeze()
        if threading.current_thread() is threading.main_thread():
            # torch's own handler would raise anywhere, in the middle of a step. It is not needed: `next` also notices a
            # dead worker.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._workers += [child for child in active_children() if child not in earlier_children]
        for indices in self.plan.batches(epoch, start):
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                raise (_explain_failure(error) or error) from error
            if isinstance(batch, BadImage | LoadingError):
                # End the workers here. The exception may become part of a reference cycle: when that is collected,
                # torch would wait 5 s for each worker and then leave it running.
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
        """Raise a DataError that names the first image that cannot be used and has no usable replacement."""
        for index in indices.tolist():
            used: int | None = None
            with suppress(BadImage):
                _, used = self._samples.load(index)
            self._samples.substitution.record(index, used)
