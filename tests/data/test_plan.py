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
