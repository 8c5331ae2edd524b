"""Which samples each rank gets, and in which order: one plan drives every loader."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from resnest_imagenet.randomness import Purpose, stream


@dataclass(frozen=True)
class BatchPlan:
    """The batches of an epoch, dealt to the ranks in turn.

    Batch n of an epoch holds the samples n * batch_size ... of that epoch's order, for any number of ranks, and goes to
    rank n % world_size. So one process that accumulates two batches and two ranks with one batch each see the same
    batches.

    Attributes:
        num_samples: size of the set, over all ranks.
        batch_size: samples per batch; the last one may be smaller.
        num_batches: batches per epoch over all ranks; in training a whole number of steps, and the remainder of the
            order is dropped.
        rank, world_size: the rank that gets these batches, and the number of ranks.
        shuffle: whether each epoch has a new order; otherwise it is the order of the set.
        seed: of the order.
        shard_sizes: samples per shard, if the set is kept in shards.
        shuffle_shards: shuffle the shards, then the samples of this many shards at a time, so that reading stays within
            them; 0: shuffle all samples.
        groups: (num_samples,) the group of each sample, such as portrait and landscape: all samples of a batch are of
            one group. None: batches take samples as they come. As in torchvision's GroupedBatchSampler, samples are
            taken in order, and a batch is complete when its group has enough samples. Less than a batch of each group
            remains. These remainders come last: the largest is filled up with the first samples of its group, then the
            next largest, until there are num_samples // batch_size batches; the other remainders are dropped in this
            epoch. So the number of batches depends neither on the groups nor on the epoch, and fewer batches than there
            are groups hold a repeated sample.
    """

    num_samples: int
    batch_size: int
    num_batches: int
    rank: int = 0
    world_size: int = 1
    shuffle: bool = False
    seed: int = 0
    shard_sizes: tuple[int, ...] = ()
    shuffle_shards: int = 0
    groups: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.groups is not None:
            assert self.shuffle and len(self.groups) == self.num_samples, "groups are of the samples of a training set"
            assert self.num_batches <= self.num_samples // self.batch_size, "batches of one group are whole"

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch."""
        return len(range(self.rank, self.num_batches, self.world_size))

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield this rank's batches of an epoch, from its `start`-th on, as arrays of sample indices."""
        order = self._shuffle(stream(self.seed, Purpose.ORDER, epoch)) if self.shuffle else np.arange(self.num_samples)
        if self.groups is not None:
            order = _group(order, self.groups[order], self.batch_size, self.num_samples // self.batch_size)
        for n in range(self.rank + start * self.world_size, self.num_batches, self.world_size):
            yield order[n * self.batch_size : (n + 1) * self.batch_size]

    def _shuffle(self, rng: np.random.Generator) -> np.ndarray:
        if not self.shuffle_shards:
            return rng.permutation(self.num_samples)
        shards = np.split(np.arange(self.num_samples), np.cumsum(self.shard_sizes)[:-1])
        order = rng.permutation(len(shards)).tolist()
        groups = [order[first : first + self.shuffle_shards] for first in range(0, len(order), self.shuffle_shards)]
        return np.concatenate([rng.permutation(np.concatenate([shards[i] for i in group])) for group in groups])


def _group(order: np.ndarray, groups: np.ndarray, batch_size: int, num_batches: int) -> np.ndarray:
    """Return an order in which each batch is of one group; see `BatchPlan.groups`.

    Args:
        order: (N,) sample indices.
        groups: (N,) the group of each, in the same order.
        batch_size: samples per batch.
        num_batches: N // batch_size.
    """
    positions = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    whole = np.concatenate([place[: len(place) // batch_size * batch_size] for place in positions])
    whole = whole.reshape(-1, batch_size)
    whole = whole[np.argsort(whole[:, -1])]  # a batch is complete when its last sample comes
    positions = sorted(positions, key=lambda place: len(place) % batch_size, reverse=True)
    for place in positions[: num_batches - len(whole)]:
        remainder = place[len(place) // batch_size * batch_size :]
        batch = np.append(remainder, np.resize(place, batch_size - len(remainder)))  # `resize` repeats from the first
        whole = np.append(whole, batch[None], axis=0)
    return order[whole.ravel()]


def plan_evaluation(num_samples: int, batch_size: int, rank: int, world_size: int) -> BatchPlan:
    """Plan one pass in the set's own order: each sample once, on one rank."""
    return BatchPlan(num_samples, batch_size, -(-num_samples // batch_size), rank, world_size)
