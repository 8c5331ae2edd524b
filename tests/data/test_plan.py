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


def draw_groups(num_samples, num_groups, seed):
    """Return a group for each sample: some are rare."""
    rng = np.random.default_rng(seed)
    return rng.choice(num_groups, num_samples, p=rng.dirichlet(np.ones(num_groups)))


# Samples, batch size, groups.
GROUPED = [(50, 4, 2), (103, 5, 3), (16, 8, 2), (31, 1, 4), (7, 7, 3), (200, 16, 5), (9, 2, 9), (64, 6, 1)]


@pytest.mark.parametrize(("num_samples", "batch_size", "num_groups"), GROUPED)
@pytest.mark.parametrize("seed", range(5))
def test_a_batch_is_of_one_group_for_any_ranks_epoch_and_start(num_samples, batch_size, num_groups, seed):
    groups = draw_groups(num_samples, num_groups, seed)
    sizes = {"num_samples": num_samples, "batch_size": batch_size, "num_batches": num_samples // batch_size}
    for epoch in range(2):
        options = {**sizes, "groups": groups, "seed": seed, "epoch": epoch}
        batches = collect(1, **options)
        assert [len(batch) for batch in batches] == [batch_size] * (num_samples // batch_size)
        assert all(len(set(groups[batch].tolist())) == 1 for batch in batches)
        for world_size in (2, 3):
            assert collect(world_size, **options) == batches
        for start in range(len(batches)):
            assert collect(1, start=start, **options) == batches[start:]
        # Twice, or not at all: less than a batch of each group.
        counts = np.bincount(np.concatenate(batches), minlength=num_samples)
        times_more = sum(count - 1 for count in counts.tolist() if count > 1)
        assert times_more <= (len(set(groups.tolist())) - 1) * (batch_size - 1)
        for group in set(groups.tolist()):
            unseen = (counts[groups == group] == 0).sum()
            assert unseen < batch_size
            assert not (unseen and (counts[groups == group] > 1).any())


def test_grouped_batches_come_as_their_groups_fill_up():
    """Against the samples of the ungrouped order, dealt into buckets one after another."""
    groups = draw_groups(500, 3, seed=1)
    sizes = {"num_samples": 500, "batch_size": 8, "num_batches": 62}
    buckets, expected = {}, []
    for sample in np.concatenate(collect(1, **{**sizes, "batch_size": 1, "num_batches": 500})).tolist():
        bucket = buckets.setdefault(groups[sample], [])
        bucket.append(sample)
        if len(bucket) == 8:
            expected.append(buckets.pop(groups[sample]))
    assert 60 <= len(expected) <= 62
    assert collect(1, **sizes, groups=groups)[: len(expected)] == expected


def test_one_group_is_no_group():
    assert collect(2, groups=np.zeros(50, np.int64)) == collect(2)


def test_a_group_smaller_than_a_batch_fills_it_with_itself():
    """Four of one group and two of the other: of three batches of two, all whole; of one of six, four and two more."""
    groups = np.array([0, 1, 0, 0, 1, 0])
    (batch,) = collect(1, num_samples=6, batch_size=6, num_batches=1, groups=groups)
    assert sorted(set(batch)) == [0, 2, 3, 5] and batch[4:] == batch[:2]
    assert {frozenset(batch) for batch in collect(1, num_samples=6, batch_size=2, num_batches=3, groups=groups)} > {
        frozenset({1, 4})
    }


# Of the commit before groups came: epoch 1 of seed 3, by shards of 13, 7, 20 and 10 samples or not.
ORDERS = {0: [[42, 20, 45, 49], [36, 41, 23, 3], [7, 6, 4, 47]], 2: [[23, 3, 24, 12], [6, 2, 30, 1], [38, 39, 36, 5]]}


@pytest.mark.parametrize("shuffle_shards", [0, 2])
def test_the_order_of_runs_that_are_there_is_what_it_was(shuffle_shards):
    shards = {"shard_sizes": (13, 7, 20, 10), "shuffle_shards": shuffle_shards}
    batches = collect(2, epoch=1, num_batches=3, **shards)
    assert batches == ORDERS[shuffle_shards]
