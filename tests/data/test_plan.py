import numpy as np
import pytest

from resnest_imagenet.data.plan import BatchPlan, plan_evaluation


def collect(world_size, epoch=0, start=0, **changes):
    """Return the batches of all ranks in their global order."""
    arguments = {"num_samples": 50, "batch_size": 4, "num_batches": 12, "shuffle": True, "seed": 3, **changes}
    plans = [BatchPlan(**arguments, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [list(plan.batches(epoch, start)) for plan in plans]
    assert [len(share) for share in shares] == [len(plan) - start for plan in plans]
    return [shares[n % world_size][n // world_size].tolist() for n in range(sum(map(len, shares)))]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_batches_do_not_depend_on_the_number_of_ranks(world_size):
    assert collect(world_size) == collect(1)


def test_an_epoch_sees_each_sample_at_most_once_and_leaves_less_than_a_step():
    seen = np.concatenate(collect(2))
    assert len(seen) == len(set(seen.tolist())) == 48


@pytest.mark.parametrize("group", [1, 2, 3, 9])
def test_shuffling_by_shards_is_a_permutation_that_stays_in_few_shards(group):
    sizes = (13, 7, 20, 10)
    shards = {"shard_sizes": sizes, "shuffle_shards": group, "batch_size": 1, "num_batches": 50}
    order = np.concatenate(collect(2, **shards))
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != np.concatenate(collect(2, epoch=1, **shards)).tolist()
    assert order[10:].tolist() == np.concatenate(collect(2, start=5, **shards)).tolist()
    of_shard = np.repeat(range(4), sizes)[order].tolist()
    being_read = [len(set(of_shard[:position]) & set(of_shard[position:])) for position in range(50)]
    assert max(being_read) == min(group, 4)


def test_epochs_and_seeds_differ_and_repeat():
    assert collect(1) == collect(1)
    assert collect(1, epoch=1) != collect(1)
    assert collect(1, seed=4) != collect(1)


def test_starting_later_yields_the_rest():
    assert collect(2, start=2) == collect(2)[4:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_sees_every_sample_once_in_order(world_size):
    plans = [plan_evaluation(103, 20, rank, world_size) for rank in range(world_size)]
    batches = [list(plan.batches(0)) for plan in plans]
    sizes = [len(batch) for share in batches for batch in share]
    assert sorted(sizes) == [3, 20, 20, 20, 20, 20]
    seen = np.concatenate([batch for share in batches for batch in share])
    assert sorted(seen.tolist()) == list(range(103))


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 2), (4, 3), (12, 2)])
def test_what_is_left_of_an_epoch_is_the_same_for_any_number_of_ranks_at_the_same_global_batch(batch_size, world_size):
    """A step is a slice of the epoch's order, whoever takes which part of it."""
    global_batch, steps, done = 24, 4, 1
    accumulation = global_batch // (batch_size * world_size)
    left = []
    for rank in range(world_size):
        plan = BatchPlan(103, batch_size, steps * accumulation * world_size, rank, world_size, shuffle=True, seed=3)
        batches = list(plan.batches(epoch=2, start=done * accumulation))
        left += [index for batch in batches for index in batch.tolist()]
    order = BatchPlan(103, global_batch, steps, shuffle=True, seed=3).batches(epoch=2, start=done)
    assert sorted(left) == sorted(np.concatenate(list(order)).tolist())
    assert len(set(left)) == (steps - done) * global_batch
