"""Every architecture by name: the ResNeSt family, the peers of the paper's tables (timm's) and registered networks.

Architecture numbers stand here and nowhere else; conf/model/ has only names.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from resnest_imagenet import extensions
from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.instances import Pixels
from resnest_imagenet.models.features import STAGES, Backbone, Norm
from resnest_imagenet.models.initialise import initialise
from resnest_imagenet.models.resnest import ResNeSt, ResNeStSpec
from resnest_imagenet.models.split_attention import Implementation
from resnest_imagenet.torchvision_import import importing_torchvision

# Mean and deviation of torchvision's and timm's training: .485 .456 .406 and .229 .224 .225, times 255.
_IMAGENET_PIXELS = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# As Caffe read pictures; conv1's weights include the standard deviation (detectron2, config/defaults.py, PIXEL_MEAN).
_CAFFE_PIXELS = Pixels((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), is_bgr=True)


@dataclass(frozen=True)
class PeerSpec:
    """A peer of Tables 3 and 5 to 7, built by timm.

    Attributes:
        timm_name: name in timm's registry, or "resnet" for timm's ResNet class with `arguments`.
        arguments: keyword arguments beyond the classifier's.
        strides_first: whether blocks that halve their map do so in the first 1x1 convolution, not in the 3x3.
        pixels: how a detector with its published weights normalises images.
    """

    timm_name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    strides_first: bool = False
    pixels: Pixels = _IMAGENET_PIXELS


_SKNET101 = {  # timm registers no SKNet-101: its SKNet-50 with the depth of a ResNet-101
    "layers": (3, 4, 23, 3),
    "cardinality": 32,
    "base_width": 4,
    "block_args": {"sk_kwargs": {"rd_ratio": 1 / 16, "rd_divisor": 32, "split_input": False}},
}

ARCHITECTURES: dict[str, ResNeStSpec | PeerSpec] = {
    # The family as released (official repository).
    "resnest14": ResNeStSpec((1, 1, 1, 1)),
    "resnest26": ResNeStSpec((2, 2, 2, 2)),
    "resnest50": ResNeStSpec((3, 4, 6, 3)),
    "resnest101": ResNeStSpec((3, 4, 23, 3), stem_width=64),
    "resnest200": ResNeStSpec((3, 24, 36, 3), stem_width=64),
    "resnest269": ResNeStSpec((3, 30, 48, 8), stem_width=64),
    # The settings of the ablation (section 5.2): radix s, cardinality x, width d.
    "resnest50_fast_1s1x64d": ResNeStSpec((3, 4, 6, 3), radix=1, avd_first=True),
    "resnest50_fast_2s1x64d": ResNeStSpec((3, 4, 6, 3), avd_first=True),
    "resnest50_fast_4s1x64d": ResNeStSpec((3, 4, 6, 3), radix=4, avd_first=True),
    "resnest50_fast_1s2x40d": ResNeStSpec((3, 4, 6, 3), radix=1, cardinality=2, width=40, avd_first=True),
    "resnest50_fast_2s2x40d": ResNeStSpec((3, 4, 6, 3), radix=2, cardinality=2, width=40, avd_first=True),
    "resnest50_fast_4s2x40d": ResNeStSpec((3, 4, 6, 3), radix=4, cardinality=2, width=40, avd_first=True),
    "resnest50_fast_1s4x24d": ResNeStSpec((3, 4, 6, 3), radix=1, cardinality=4, width=24, avd_first=True),
    "resnest101_fast": ResNeStSpec((3, 4, 23, 3), avd_first=True),
    # Not in the paper: half of ResNeSt-14's channels, for the demo, tests and small pictures.
    "resnest14_half": ResNeStSpec((1, 1, 1, 1), stem_width=16, planes=32),
    # The peers of Table 3.
    "resnet50": PeerSpec("resnet50"),
    "resnet101": PeerSpec("resnet101"),
    "resnext50_32x4d": PeerSpec("resnext50_32x4d"),
    "resnext101_32x4d": PeerSpec("resnext101_32x4d"),
    "seresnext50_32x4d": PeerSpec("seresnext50_32x4d"),
    "seresnext101_32x4d": PeerSpec("seresnext101_32x4d"),
    "resnet50d": PeerSpec("resnet50d"),
    "resnet101d": PeerSpec("resnet101d"),
    "skresnext50_32x4d": PeerSpec("skresnext50_32x4d"),
    "skresnext101_32x4d": PeerSpec("resnet", _SKNET101),
    # The ResNets of Table 7: three 3x3 convolutions of 64, 64 and 128 channels in the stem (Gluon's v1s).
    "resnet50s": PeerSpec("resnet50s"),
    "resnet101s": PeerSpec("resnet101s"),
    # The ResNets of Tables 5 and 6: the first published ones (arXiv 1512.03385), known as MSRA's.
    "resnet50_msra": PeerSpec("resnet50", strides_first=True, pixels=_CAFFE_PIXELS),
    "resnet101_msra": PeerSpec("resnet101", strides_first=True, pixels=_CAFFE_PIXELS),
}
extensions.models.reserve(ARCHITECTURES)

# Side in pixels of the images that the published weights are tested on, if it is not 224 (the paper's section 5.1 and
# Table 3, the official repository).
_TEST_CROPS = {"resnest101": 256, "resnest200": 320, "resnest269": 416}

# timm's names of the ResNeSts that it has.
TIMM_RESNESTS: dict[str, str] = {
    "resnest14": "resnest14d",
    "resnest26": "resnest26d",
    "resnest50": "resnest50d",
    "resnest101": "resnest101e",
    "resnest200": "resnest200e",
    "resnest269": "resnest269e",
    "resnest50_fast_4s2x40d": "resnest50d_4s2x40d",
    "resnest50_fast_1s4x24d": "resnest50d_1s4x24d",
}


def list_models() -> list[str]:
    """Return the names that `build_model` takes, sorted."""
    return sorted({*ARCHITECTURES, *extensions.models.read()})


def usual_crop(name: str) -> int:
    """Return the side of the images that a network is usually tested on, in pixels."""
    outside = extensions.models.find(name)
    return outside.crop if outside else _TEST_CROPS.get(name, 224)


def find_head(name: str) -> str:
    """Return the name of a network's classifier, a module with a weight; "fc" for an unknown network."""
    outside = extensions.models.find(name)
    return outside.head if outside else "fc"


def find_pixels(name: str) -> Pixels:
    """Return how a detector on this network normalises its images."""
    spec = ARCHITECTURES.get(name)
    return spec.pixels if isinstance(spec, PeerSpec) else Pixels()


def strides_first(name: str) -> bool:
    """Return whether a network's blocks halve their map in the first 1x1 convolution, as in MSRA's ResNets."""
    spec = ARCHITECTURES.get(name)
    return isinstance(spec, PeerSpec) and spec.strides_first


def count_outputs(model: nn.Module, name: str) -> int:
    """Return the width of the classifier of a network of this name."""
    return len(model.get_parameter(f"{find_head(name)}.weight"))


def require_model(name: str) -> None:
    """Raise a ConfigError with the nearest name unless `build_model` takes this one."""
    if name not in ARCHITECTURES and extensions.models.find(name) is None:
        raise ConfigError(f"unknown model {name!r}{suggest(name, list_models())}")


def build_model(
    name: str,
    num_classes: int = 1000,
    dropout: float = 0.0,
    zero_gamma: bool = True,
    output_stride: int = 32,
    init: Literal["fan_in", "fan_out"] = "fan_in",
    split_attention: Implementation = "auto",
    features_only: bool = False,
    out_features: Sequence[str] = tuple(STAGES),
    freeze_at: int = 0,
    norm: Norm = "bn",
) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: one of `list_models()`. A registered network (`extensions.register_model`) initialises itself: its
            builder gets init and zero_gamma only if it takes them.
        num_classes: width of the classifier.
        dropout: probability before the classifier.
        zero_gamma: the weight of each block's last BN starts at 0 (Goyal et al. 2017, section 5.1).
        output_stride: input pixels per output pixel of the last features: 32, 16 or 8.
        init: what `initialise` does: "fan_in" or "fan_out".
        split_attention: how it is computed: "auto", "fused" or "reference"; the peers have none.
        features_only: build a `Backbone` for detection and segmentation: no classifier, a list of features.
        out_features: for a backbone: the features to return, from "stem" (stride 2) and "layer1" to "layer4".
        freeze_at: for a backbone: how many of these stages, from the first, are not trained.
        norm: for a backbone: "bn", "frozen" (statistics, weights and biases stay as they are) or "sync" (statistics
            over all ranks; torch computes these on accelerators only).

    Returns:
        A module that maps normalised images (B, 3, H, W) to logits (B, num_classes), or a `Backbone`.

    Raises:
        ConfigError: (a ValueError) for an unknown name, options of a backbone that do not fit, or a registered network
            that fails or does not take an option.
    """
    require_model(name)
    outside = extensions.models.find(name)
    if outside is not None:
        options = {"dropout": dropout, "output_stride": output_stride, "split_attention": split_attention}
        model = _build_outside(name, outside, num_classes, options, {"zero_gamma": zero_gamma, "init": init})
    else:
        spec = ARCHITECTURES[name]
        if isinstance(spec, ResNeStSpec):
            model = ResNeSt(spec, num_classes, dropout, zero_gamma, output_stride, split_attention)
        else:
            model = _build_peer(spec, num_classes, dropout, zero_gamma, output_stride)
        initialise(model, init)
    if features_only:
        model = _synchronise(model) if norm == "sync" else model
        with extensions.naming(f"features_only of model {name!r} of {outside.origin}") if outside else nullcontext():
            return Backbone(model, out_features, output_stride, freeze_at, norm)
    if (tuple(out_features), freeze_at, norm) != (tuple(STAGES), 0, "bn"):
        raise ConfigError("out_features, freeze_at and norm are options of a backbone: set features_only=True")
    return model


def _build_peer(spec: PeerSpec, num_classes: int, dropout: float, zero_gamma: bool, output_stride: int) -> nn.Module:
    arguments = {
        "num_classes": num_classes,
        "drop_rate": dropout,
        "zero_init_last": zero_gamma,
        "output_stride": output_stride,
        **spec.arguments,
    }
    # timm takes seconds to import, and the family does not need it.
    with importing_torchvision():
        from timm import create_model
        from timm.models.resnet import ResNet
        from timm.models.sknet import SelectiveKernelBottleneck
    if spec.timm_name == "resnet":
        return ResNet(SelectiveKernelBottleneck, **arguments)
    model = create_model(spec.timm_name, **arguments)
    return _move_strides(model) if spec.strides_first else model


def _move_strides(model: nn.Module) -> nn.Module:
    """Move the strides of a timm ResNet's blocks from their 3x3 convolutions to the 1x1 ones before them."""
    from timm.models.resnet import Bottleneck

    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def _build_outside(
    name: str, outside: extensions.Model, num_classes: int, options: dict[str, Any], first_weights: dict[str, Any]
) -> nn.Module:
    """Build a registered network with the options that its builder takes.

    Args:
        name: of the network.
        outside: the registration.
        num_classes: width of the classifier.
        options: options of `build_model` that must keep their defaults if the builder does not take them.
        first_weights: options of `build_model` that are ignored if the builder does not take them.
    """
    label = f"model {name!r} of {outside.origin}"
    defaults = inspect.signature(build_model).parameters
    with extensions.naming(label):
        taken = inspect.signature(outside.build).parameters
        for option, value in options.items():
            if option not in taken and value != defaults[option].default:
                raise ConfigError(f"{label} takes no {option}={value}: leave it at {defaults[option].default}")
        accepted = {option: value for option, value in (options | first_weights).items() if option in taken}
        model = outside.build(num_classes=num_classes, **accepted)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{label}: its builder returned a {type(model).__name__}, not an nn.Module")
    head = dict(model.named_parameters()).get(f"{outside.head}.weight")
    if head is None or len(head) != num_classes:
        raise ConfigError(
            f"{label}: {outside.head}.weight is not a parameter with a row for each of {num_classes} classes: "
            "name the classifier with register_model(..., head=NAME)"
        )
    return model


def _synchronise(model: nn.Module) -> nn.Module:
    if isinstance(model, ResNeSt):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # torch's conversion would drop the activations inside the batch norms of timm's SKNets.
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)
