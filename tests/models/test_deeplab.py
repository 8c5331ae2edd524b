"""DeepLabV3 against a build from timm's and torchvision's parts, and the figures of Table 7's networks."""

import pytest
import torch
from torch import nn

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.cost import count_deeplab
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.models.folding import fold_batch_norms

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
SMALL = {"channels": 32, "rates": (2, 4, 6)}  # for features of some pixels


def build(name="resnest14_half", num_classes=5, **options):
    """Return a network of float64 whose norms have statistics of their own."""
    torch.manual_seed(0)
    model = build_deeplab(name, num_classes, **{**SMALL, "zero_gamma": False, **options}).double()
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


class Oracle(nn.Module):
    """Timm's backbone, torchvision's heads, and bilinear interpolation by its formula."""

    def __init__(self, name, num_classes, channels, rates):
        import timm
        from torchvision.models.segmentation.deeplabv3 import ASPP
        from torchvision.models.segmentation.fcn import FCNHead

        super().__init__()
        self.backbone = timm.create_model(name, features_only=True, out_indices=(3, 4), output_stride=8)
        if name.startswith("resnest"):  # where the stride is 1, the official code pools behind the attention, timm not
            for layer in (self.backbone.layer3, self.backbone.layer4):
                layer[0].avd_last, layer[0].downsample[0] = nn.AvgPool2d(3, 1, padding=1), nn.Identity()
        self.head = nn.Sequential(
            ASPP(2048, rates, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.auxiliary = FCNHead(1024, num_classes)

    def forward(self, images):
        layer3, layer4 = self.backbone(images)
        return [upsample(head(x), *images.shape[2:]) for head, x in ((self.head, layer4), (self.auxiliary, layer3))]


def upsample(maps, *sides):
    """Interpolate linearly between the pixels, along one axis after the other; the first and last ones stay."""
    for axis, side in zip((2, 3), sides, strict=True):
        places = torch.arange(side, dtype=maps.dtype) * (maps.shape[axis] - 1) / (side - 1)
        below = places.floor().long().clamp(max=maps.shape[axis] - 2)
        part = (places - below).view((-1, 1) if axis == 2 else (-1,))
        maps = maps.index_select(axis, below) * (1 - part) + maps.index_select(axis, below + 1) * part
    return maps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "timm_name", "training"),
    [("resnest26", "resnest26d", True), ("resnest26", "resnest26d", False), ("resnet50s", "resnet50s", True)],
)
def test_equals_timms_and_torchvisions_parts(name, timm_name, training):
    """Logits, gradients and running statistics, of images of odd sides; dropout draws the same.

    ResNeSt-26 has what the deeper ones repeat: in each layer a block with a shortcut of its own and one without.
    """
    model = build(name).train(training)
    oracle = Oracle(timm_name, 5, **SMALL).double().train(training)
    pairs = dict(zip(oracle.state_dict(), model.state_dict(), strict=True))
    oracle.load_state_dict({theirs: model.state_dict()[ours] for theirs, ours in pairs.items()})
    images = torch.randn(2, 3, 27, 45, dtype=torch.float64)
    results = []
    for network in (model, oracle):
        torch.manual_seed(1)
        outputs = network(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple | list) else (outputs,)
        results.append([logits, *auxiliary] if training else [logits])
        sum((k + 1) * out.square().mean() for k, out in enumerate(results[-1])).backward()
    assert [out.shape for out in results[0]] == [(2, 5, 27, 45)] * (1 + training)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    gradients = dict(model.named_parameters())
    for theirs, parameter in oracle.named_parameters():
        if training or not theirs.startswith("auxiliary."):
            close = 1e-9 * parameter.grad.abs().max().item() + 1e-12
            torch.testing.assert_close(gradients[pairs[theirs]].grad, parameter.grad, rtol=0, atol=close, msg=theirs)
    for theirs, buffer in oracle.named_buffers():
        torch.testing.assert_close(model.get_buffer(pairs[theirs]), buffer, msg=theirs)


# Parameters with 150 classes, and the backbone's multiply-adds at 480 and 768 pixels, as counted once.
GOLDEN = {
    "resnet50s": [42194156, 93949286400, 240510173184],
    "resnet101s": [61186284, 162226944000],
    "resnest50": [43996588, 90432505696, 231504269152],
    "resnest101": [64788364, 163857129440],
}
# The same counted by others, without batch norms, in millions and billions. For the ResNets they had plain stems: three
# 3x3 convolutions in place of one of 7x7 at half the side, and 64 channels more into layer1, are 123,776 parameters.
COUNTED = {
    "resnet50s": (42.070 + 0.123776, 87.6 + 6.223, 224.3 + 15.930),
    "resnet101s": (61.063 + 0.123776, 155.8 + 6.223),
    "resnest50": (43.997, 90.3, 231.2),
    "resnest101": (64.788, 163.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_and_multiply_adds(name):
    """At 768 pixels of the networks with 50 layers: the others repeat their blocks."""
    ade = count_deeplab(name, 150, 480)
    cityscapes = [] if "101" in name else [count_deeplab(name, 19, 768)]
    assert [cost.stage for cost in ade] == ["backbone", "head", "auxiliary"]
    counted = [sum(cost.parameters for cost in ade), *(costs[0].multiply_adds for costs in (ade, *cityscapes))]
    assert counted == GOLDEN[name]
    assert [round(cost.parameters / 1e6, 3) for cost in ade[1:]] == [16.164, 2.398]
    assert [round(costs[1].multiply_adds / 1e9, 1) for costs in (ade, *cityscapes)] == [56.3, 143.8][: len(counted) - 1]
    millions, *billions = COUNTED[name]
    assert counted[0] / 1e6 == pytest.approx(millions, abs=0.001)
    assert [count / 1e9 for count in counted[1:]] == pytest.approx(billions, rel=0.002)


def test_the_heads_products_equal_the_convolutions():
    """In channels_last gradients of the heads' weights are products of matrices: those of the test above are not."""
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model = build().to(memory_format=layout)
        torch.manual_seed(1)
        images = torch.randn(3, 3, 49, 66, dtype=torch.float64).contiguous(memory_format=layout)
        # Not the dropout: it draws by the order of the memory.
        for module in (model.head, model.auxiliary):
            module.eval()
        logits, auxiliary = model(images)
        (logits.square().mean() + auxiliary.square().mean()).backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        close = 1e-9 * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(gradient, results[1][name], rtol=0, atol=close, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_the_auxiliary_head(training):
    """Logits of the images' size, odd ones too; without the auxiliary head there are no others."""
    images = torch.randn(2, 3, 33, 50, dtype=torch.float64)
    model = build().train(training)
    outputs = model(images)
    assert [out.shape for out in (outputs if training else [outputs])] == [(2, 5, 33, 50)] * (1 + training)
    alone = build(auxiliary=False).train(training)
    alone.load_state_dict({key: value for key, value in model.state_dict().items() if "auxiliary" not in key})
    torch.manual_seed(0)
    assert alone(images).shape == (2, 5, 33, 50)
    if not training:
        assert torch.equal(alone(images), outputs)


@pytest.mark.parametrize("norm", ["bn", "frozen", "sync"])
def test_norms(norm):
    """Frozen ones stay as they are, in the heads too; synchronised ones are plain ones in a process alone."""
    model = build(norm=norm)
    model.eval().train()  # as frameworks do
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(1)
    logits, auxiliary = model(images)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    assert all(isinstance(module, nn.SyncBatchNorm) == (norm == "sync") for module in norms)
    of_norms = tuple(f"{path}." for path, module in model.named_modules() if module in norms)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if norm != "frozen" or not key.startswith(of_norms)}
    if norm == "sync":
        plain = build(norm="bn").train()
        torch.manual_seed(1)
        expected, _ = plain(images)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("norm", ["bn", "sync"])
def test_can_be_folded(norm):
    model = build(norm=norm).eval()
    folded = fold_batch_norms(model)
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    images = torch.randn(2, 3, 33, 50, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-7 * expected.abs().max().item())


def test_unknown_backbone():
    with pytest.raises(ConfigError, match="unknown model 'resnest51'; did you mean"):
        build_deeplab("resnest51", 5)
