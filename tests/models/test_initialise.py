import pytest
import torch

from resnest_imagenet import build_model

# Of two convolutions and fc: inputs of one group and outputs of all groups, times the kernel's area.
FANS = {
    "resnest14": {"layer4.0.conv1": (1024, 512), "layer4.0.conv2.conv": (256 * 9, 1024 * 9), "fc": (2048, 1000)},
    "resnext50_32x4d": {"layer4.0.conv1": (1024, 1024), "layer4.0.conv2": (32 * 9, 1024 * 9), "fc": (2048, 1000)},
}


@pytest.mark.parametrize("name", ["resnest14", pytest.param("resnext50_32x4d", marks=pytest.mark.slow)])
@pytest.mark.parametrize("init", ["fan_in", "fan_out"])
def test_weights_are_normal_with_two_over_the_fan(name, init):
    torch.manual_seed(0)
    model = build_model(name, init=init)
    for place, (fan_in, fan_out) in FANS[name].items():
        weight = model.get_parameter(f"{place}.weight")
        variance = 2 / (fan_in if init == "fan_in" else fan_out)
        if place == "fc" and init == "fan_out":
            variance = 1 / (3 * fan_in)  # as torch draws it: uniform within 1 / sqrt(fan_in)
        assert weight.var().item() == pytest.approx(variance, rel=0.02)
        assert abs(weight.mean().item()) < 0.01 * weight.std().item()
    assert (model.fc.bias.count_nonzero() == 0) == (init == "fan_in")


@pytest.mark.slow
def test_zero_gamma_outlives_the_initialisation():
    assert build_model("resnest14").layer1[0].bn3.weight.count_nonzero() == 0
    assert build_model("resnet50").layer1[0].bn3.weight.count_nonzero() == 0
    assert build_model("resnet50", zero_gamma=False).layer1[0].bn3.weight.min() == 1
