"""Which samples each rank sees, in which order: one plan drives every loader."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from resnest_imagenet.randomness import Purpose, stream


@dataclass(frozen=True)
class BatchPlan:
    """The batches of an epoch, dealt to the ranks in turn.

    Batch n of an epoch holds the samples n * batch_size ... of that epoch's order, whatever the number of ranks, and
    goes to rank n % world_size. So one process that accumulates two batches and two ranks that take one each see the
    same batches.

    Attributes:
        num_samples: size of the set, over all ranks.
        batch_size: samples per batch; the last one may be smaller.
        num_batches: batches per epoch over all ranks; in training a whole number of steps, the remainder of the
            order is left out.
        rank, world_size: whose share this is.
        shuffle: a new order in every epoch; otherwise the order of the set.
        seed: of the order.
        shard_sizes: samples per shard, of a set that is kept in shards.
        shuffle_shards: shuffle the shards, then the samples of so many at a time, so that reading stays within these;
            0: shuffle all samples.
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

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch."""
        return len(range(self.rank, self.num_batches, self.world_size))

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield this rank's batches of an epoch, from its `start`-th on, as arrays of sample indices."""
        order = self._shuffle(stream(self.seed, Purpose.ORDER, epoch)) if self.shuffle else np.arange(self.num_samples)
        for n in range(self.rank + start * self.world_size, self.num_batches, self.world_size):
            yield order[n * self.batch_size : (n + 1) * self.batch_size]

    def _shuffle(self, rng: np.random.Generator) -> np.ndarray:
        if not self.shuffle_shards:
            return rng.permutation(self.num_samples)
        shards = np.split(np.arange(self.num_samples), np.cumsum(self.shard_sizes)[:-1])
        order = rng.permutation(len(shards)).tolist()
        groups = [order[first : first + self.shuffle_shards] for first in range(0, len(order), self.shuffle_shards)]
        return np.concatenate([rng.permutation(np.concatenate([shards[i] for i in group])) for group in groups])


def plan_evaluation(num_samples: int, batch_size: int, rank: int, world_size: int) -> BatchPlan:
    """Plan one pass in the set's own order: each sample once, on one rank."""
    return BatchPlan(num_samples, batch_size, -(-num_samples // batch_size), rank, world_size)
