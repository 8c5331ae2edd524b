"""Randomness without state: every draw is a function of the seed and of its purpose, epoch and number.

So an exact resumption needs no saved state, and a draw depends neither on the number of workers nor on that of ranks.
"""

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


class Purpose(enum.IntEnum):
    """What a draw decides; streams of different purposes are independent."""

    ORDER = 0  # of the samples of an epoch
    CROP = 1  # crop and flip of one sample
    MIXING = 2  # of one batch
    MODEL = 3  # dropout and the like, in one batch
    APPEARANCE = 4  # of one sample: policy, colours
    ERASING = 5  # in the images of one batch
    SIZE = 6  # size and flip of one image with objects


def stream(seed: int, purpose: Purpose, epoch: int, number: int = 0) -> np.random.Generator:
    """Return the generator of one decision.

    Args:
        seed: the run's, 0 <= seed < 2**63.
        purpose: of the decision.
        epoch: counted from 0.
        number: of the sample or the batch within its epoch.
    """
    # Philox is counter-based: the two upper counter words choose the stream, the lower two count within it.
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, number, epoch]))


@dataclass(frozen=True)
class Draws:
    """All randomness of one batch.

    Attributes:
        seed: the run's.
        epoch: counted from 0.
        number: of the batch in the epoch, over all ranks.
    """

    seed: int
    epoch: int
    number: int

    def stream(self, purpose: Purpose) -> np.random.Generator:
        """Return the generator of one decision about the batch."""
        return stream(self.seed, purpose, self.epoch, self.number)

    def seed_torch(self) -> None:
        """Seed torch's own generators, for dropout, DropBlock and the choice of proposals."""
        import torch

        torch.manual_seed(int(self.stream(Purpose.MODEL).integers(2**63)))


def streams(seed: int, purpose: Purpose, epoch: int, numbers: Iterable[int]) -> Iterator[np.random.Generator]:
    """Yield `stream(seed, purpose, epoch, number)` for each number, in a third of the time.

    It is one generator, which the next step sets to the next number.
    """
    philox = np.random.Philox(key=[seed, purpose])
    generator, state = np.random.Generator(philox), philox.state
    for number in numbers:
        state["state"]["counter"] = np.array([0, 0, number, epoch], np.uint64)
        philox.state = state
        yield generator


def uniform_rows(seed: int, purpose: Purpose, epoch: int, numbers: Iterable[int], count: int) -> np.ndarray:
    """Return `stream(seed, purpose, epoch, number).random(count)` for each number, as rows."""
    numbers = list(numbers)
    rows = np.empty((len(numbers), count))
    for row, generator in zip(rows, streams(seed, purpose, epoch, numbers), strict=True):
        generator.random(out=row)
    return rows
