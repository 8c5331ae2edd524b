"""What was measured: the content of results files, and a figure with where it was read."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from resnest_imagenet.options import Options

MIOU = "miou"  # the metric of segmentation
BOX_AP, MASK_AP = "box_ap", "mask_ap"  # the metrics of detection without and with masks


class ClassResult(Options):
    """The figures of one class, see `evaluation.mistakes.ClassFigures`.

    Attributes:
        precision, recall, f1: percent; None for a class without images.
        images: number of images of the class.
        predicted: number of images predicted as the class.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    images: int
    predicted: int


class CropResult(Options):
    """Accuracy under one protocol.

    Attributes:
        crop: side of the images that the network saw, in pixels.
        top1, top5: percent.
        correct1, correct5, count: the numbers of images from which they are computed.
        protocol: how the images were resized and cropped.
        macro_precision, macro_recall, macro_f1: means of the classes with images, in percent; macro_recall is the
            balanced accuracy. None in files of earlier versions.
        classes: the figures of each of the network's classes; None in files of earlier versions.
        tta: the test-time augmentation, "flip", or None.
    """

    crop: int
    top1: float
    top5: float
    correct1: int
    correct5: int
    count: int
    protocol: str
    macro_precision: float | None = None
    macro_recall: float | None = None
    macro_f1: float | None = None
    classes: dict[str, ClassResult] | None = None
    tta: str | None = None


class Results(Options):
    """A results file of classification, of resnest-eval out=...

    Attributes:
        model: name of the network.
        ckpt: the weights that were evaluated.
        is_average: whether they were the moving average.
        num_classes: of the network.
        epoch, training: epochs done and all training options, if the checkpoint has them.
        results: one for each crop.
    """

    model: str
    ckpt: str
    is_average: bool
    num_classes: int
    epoch: int | None
    training: dict[str, Any] | None
    results: list[CropResult]


class RegionResult(Options):
    """How well the pixels of a set of scenes are classified, under one protocol.

    Attributes:
        protocol: how the network saw the scenes.
        miou, miou_present: mean IoU over all classes, and over those in the ground truth, in percent.
        pixel_accuracy: percent.
        count: scenes.
        iou: percent, by class; the classes in the order of the network's outputs.
    """

    protocol: str
    miou: float
    miou_present: float
    pixel_accuracy: float
    count: int
    iou: dict[str, float]


class RegionResults(Options):
    """A results file of segmentation, of resnest-eval out=...

    Attributes:
        task: tells it from the file of another task.
        model: name of the backbone.
        ckpt: the weights that were evaluated.
        data: layout of the scenes: ade20k, cityscapes or masks.
        is_average: whether they were the moving average.
        epoch, training: epochs done and all training options, if the checkpoint has them.
        results: one for each protocol.
    """

    task: Literal["segmentation"]
    model: str
    ckpt: str
    data: str
    is_average: bool
    epoch: int | None
    training: dict[str, Any] | None
    results: list[RegionResult]


class BoxResult(Options):
    """How well the objects of a set are detected, in percent; a results file has more of COCO's figures.

    Attributes:
        protocol: how the network saw the images, and which detections count.
        box_ap, mask_ap: COCO's AP; mask_ap is None for a detector without masks.
        count: images.
        ap_per_class: for "box" and "mask", the AP of each class; None for a class without objects in the set.
    """

    model_config = ConfigDict(extra="ignore")

    protocol: str
    box_ap: float
    mask_ap: float | None = None
    count: int
    ap_per_class: dict[str, dict[str, float | None]]


class BoxResults(Options):
    """A results file of detection, of resnest-eval out=...

    Attributes:
        task: tells it from the file of another task.
        model: name of the backbone.
        detector: its kind, see `models.rcnn_options.name_detector`.
        ckpt: the weights that were evaluated.
        is_average: whether they were the moving average.
        epoch, training: epochs done and all training options, if the checkpoint has them.
        results: one for each protocol.
    """

    task: Literal["detection"]
    model: str
    detector: str
    ckpt: str
    is_average: bool
    epoch: int | None
    training: dict[str, Any] | None
    results: list[BoxResult]


@dataclass(frozen=True)
class Measured:
    """One accuracy that was measured here.

    Attributes:
        model: name of the network.
        crop: side of the images in pixels.
        top1: percent.
        count, num_classes: of the images on which it was measured; ImageNet has 50000 and 1000.
        recipe: the recipe of the weights, or their source.
        protocol: how the images were resized and cropped.
        source: the file with this figure.
        tta: the test-time augmentation, or None. Accuracies with one do not stand beside the paper's.
    """

    model: str
    crop: int
    top1: float
    count: int
    num_classes: int
    recipe: str
    protocol: str
    source: str
    tta: str | None = None


@dataclass(frozen=True)
class MeasuredRegions:
    """One evaluation of segmentation that was measured here.

    Attributes:
        model: name of the backbone.
        data: layout of the scenes: ade20k, cityscapes or masks.
        miou, pixel_accuracy: percent.
        count, num_classes: of the scenes on which it was measured.
        recipe: the recipe of the weights, or their source.
        protocol: how the network saw the scenes.
        source: the file with these figures.
    """

    model: str
    data: str
    miou: float
    pixel_accuracy: float
    count: int
    num_classes: int
    recipe: str
    protocol: str
    source: str


@dataclass(frozen=True)
class MeasuredBoxes:
    """One evaluation of detection that was measured here.

    Attributes:
        model: name of the backbone.
        detector: its kind, see `models.rcnn_options.name_detector`.
        data: layout of the data set: coco.
        box_ap, mask_ap: percent; mask_ap is None for a detector without masks.
        count, num_classes: of the images on which it was measured; val2017 has 5000 and 80.
        recipe: the recipe of the weights, or their source.
        protocol: how the network saw the images, and which detections count.
        source: the file with these figures.
    """

    model: str
    detector: str
    data: str
    box_ap: float
    mask_ap: float | None
    count: int
    num_classes: int
    recipe: str
    protocol: str
    source: str


Result = Measured | MeasuredRegions | MeasuredBoxes
