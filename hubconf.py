"""The networks for torch.hub: torch.hub.load("OWNER/resnest-imagenet", "resnest50", pretrained=True).

torch.hub clones the repository and installs nothing: this file uses the package in src/. Every callable in this file
without a leading underscore is an entry, so all other names are modules.
"""

import dataclasses
import os
import pathlib
import sys
import typing

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "src"))

from resnest_imagenet import errors
from resnest_imagenet.models import features, zoo
from resnest_imagenet.weights import published

dependencies = ["torch", "timm", "safetensors", "filelock", "pydantic"]

_DOCUMENTATION = """{name} in training mode, with random weights or published ones.

Maps normalised images (B, 3, H, W) to logits (B, num_classes): RGB in 0..1, minus mean (0.485, 0.456, 0.406), over std
(0.229, 0.224, 0.225). With weights, the attribute crop is the side of the images on which these are evaluated: a
run's own, or the published one, usually {crop} pixels.

Args:
    pretrained: {choice}"timm:NAME" or a file.
    num_classes: width of the classifier; the classifier is new if the weights have another number.
    **options: further options of resnest_imagenet.build_model, such as dropout or output_stride.

Raises:
    ConfigError: (a ValueError) an option or the weights do not exist.
    CheckpointError: the weights cannot be fetched or read, or do not fit.
"""


def _make_entry(name: str) -> typing.Callable[..., typing.Any]:
    def entry(
        pretrained: bool | str | os.PathLike[str] = False, num_classes: int = 1000, **options: typing.Any
    ) -> typing.Any:
        model = zoo.build_model(name, num_classes, **options)
        if pretrained:
            _load(model, name, pretrained, num_classes)
        return model

    entry.__name__ = name
    choice = "True for the authors' weights; or " if name in published.OFFICIAL else ""
    entry.__doc__ = _DOCUMENTATION.format(name=name, choice=choice, crop=zoo.usual_crop(name))
    return entry


def _load(model: typing.Any, name: str, pretrained: bool | str | os.PathLike[str], num_classes: int) -> None:
    # Imported late: torch.hub reports missing dependencies after it has read this file.
    from resnest_imagenet.weights.load import load_backbone, read_weights, start_from

    if pretrained is True and name not in published.OFFICIAL:
        raise errors.ConfigError(f"there are no official weights of {name}: give pretrained='timm:NAME' or a file")
    source = f"official:{name}" if pretrained is True else pretrained
    if isinstance(model, features.Backbone):
        load_backbone(model, name, source)
        return
    weights = read_weights(source)
    model.crop = weights.crop or zoo.usual_crop(name)
    # The caller does not name the classes, so an equal number of classes is taken to mean the same classes.
    classes = list(map(str, range(num_classes)))
    start_from(model, name, classes, dataclasses.replace(weights, classes=classes))


def _read_trained(
    entry: str,
    task: str,
    pretrained: bool | str | os.PathLike[str],
    backbone: str | None,
    num_classes: int | None,
    options: dict[str, typing.Any],
) -> typing.Any:
    """Return the weights of a network of another task; None without pretrained, if the other arguments are complete."""
    from resnest_imagenet.weights.load import read_weights

    if not pretrained:
        if backbone is None or num_classes is None:
            raise errors.ConfigError(f"{entry} needs backbone and num_classes, or pretrained")
        return None
    if pretrained is True:
        raise errors.ConfigError(f"there are no published weights of {entry}: give pretrained=FOLDER or a checkpoint")
    if options or (backbone, num_classes) != (None, None):
        raise errors.ConfigError(f"{pretrained} has its backbone, classes and options: give pretrained alone")
    return read_weights(pretrained, tasks=(task,))


def deeplabv3(
    backbone: str | None = None,
    num_classes: int | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    **options: typing.Any,
) -> typing.Any:
    """DeepLabV3 on any of these networks, in training mode, with random weights or trained ones.

    Maps images (B, 3, H, W), normalised as for its backbone, to logits (B, num_classes, H, W); in training mode to a
    pair of these and the auxiliary head's logits. With weights, the attributes classes, palette (red, green and blue of
    each class, or None) and crop (of the training, in pixels) are the run's.

    Args:
        backbone: name of another entry; None with pretrained, which includes it.
        num_classes: width of the logits; None with pretrained.
        pretrained: a folder of resnest-export format=hub, or a checkpoint of a run of segmentation.
        **options: further options of build_deeplab of models/deeplab.py, such as output_stride; not with pretrained.

    Raises:
        ConfigError: (a ValueError) an option does not exist, or pretrained includes it.
        CheckpointError: the weights cannot be read, or are not of segmentation.
    """
    from resnest_imagenet.models.deeplab import build_deeplab
    from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab

    weights = _read_trained("deeplabv3", SEGMENTATION, pretrained, backbone, num_classes, options)
    if weights is None:
        return build_deeplab(backbone, num_classes, **options)
    model = restore_deeplab(weights)
    for name, value in {
        "classes": weights.classes,
        "palette": weights.palette,
        "crop": weights.training["crop"],
    }.items():
        setattr(model, name, value)
    return model


def rcnn(
    backbone: str | None = None,
    num_classes: int | None = None,
    pretrained: bool | str | os.PathLike[str] = False,
    **options: typing.Any,
) -> typing.Any:
    """Faster, Mask or Cascade R-CNN on any of these networks, in training mode, with random weights or trained ones.

    Maps images (B, 3, H, W), padded with zeros at the right and at the bottom to multiples of 32, and the (height,
    width) of each image without padding to the detections of each: boxes, scores, labels and masks. In training mode it
    takes targets instead of the sizes and returns its losses. With weights, the attributes are the run's: classes, and
    pixels (mean and std of 0..255, and whether blue comes first), with which images are normalised.

    Args:
        backbone: name of another entry; None with pretrained, which includes it.
        num_classes: of the data set, without the background; None with pretrained.
        pretrained: a folder of resnest-export format=hub, or a checkpoint of a run of detection.
        **options: of RCNNOptions of models/rcnn_options.py, such as masks=True; not with pretrained.

    Raises:
        ConfigError: (a ValueError) an option does not exist, or pretrained includes it.
        CheckpointError: the weights cannot be read, or are not of detection.
    """
    from resnest_imagenet.models.rcnn import build_rcnn
    from resnest_imagenet.weights.detection import DETECTION, restore_rcnn

    weights = _read_trained("rcnn", DETECTION, pretrained, backbone, num_classes, options)
    if weights is None:
        return build_rcnn(backbone, num_classes, **options)
    model = restore_rcnn(weights)
    model.classes, model.pixels = weights.classes, zoo.find_pixels(weights.model)
    return model


for _name in zoo.list_models():
    globals()[_name] = _make_entry(_name)
