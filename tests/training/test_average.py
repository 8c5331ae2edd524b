from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnest_imagenet.training.average import MovingAverage


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_it_is_torchs_bit_for_bit(decay):
    network = make_network()
    ours = MovingAverage(network, decay)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(5):
        with torch.no_grad():
            for value in (*network.parameters(), *network.buffers()):
                value.copy_(torch.randn(value.shape) * 10)
        ours.update(torch.tensor(True))
        theirs.update_parameters(network)
    assert ours.updates == theirs.n_averaged == 5
    expected = theirs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        if name == "1.num_batches_tracked":  # torch's truncates an average
            assert value == network[1].num_batches_tracked
        else:
            assert torch.equal(value, expected[name]), name


def test_an_unwanted_update_leaves_all_as_it_is_and_the_first_wanted_one_takes_all():
    network = make_network()
    average = MovingAverage(network, 0.9)
    for is_wanted in (False, True, False):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        before = deepcopy(average.module.state_dict())
        average.update(torch.tensor(is_wanted))
        expected = network.state_dict() if is_wanted else before
        assert all(torch.equal(value, expected[name]) for name, value in average.module.state_dict().items())
    assert average.updates == 1


def test_a_warm_up_keeps_less_at_first():
    """TensorFlow's ExponentialMovingAverage with num_updates, in Python's numbers; a skipped update does not count."""
    network, values = nn.Linear(1, 1, bias=False), [3.0, -1.0, 2.0, 5.0, 0.5] * 5
    average = MovingAverage(network, 0.7, warms_up=True)
    expected, count = 0.0, 0
    for number, value in enumerate(values):
        nn.init.constant_(network.weight, value)
        is_wanted = number != 2
        average.update(torch.tensor(is_wanted))
        if is_wanted:
            decay = min(0.7, (1 + count) / (10 + count)) if count else 0
            expected, count = decay * expected + (1 - decay) * value, count + 1
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert average.updates == count == 24
