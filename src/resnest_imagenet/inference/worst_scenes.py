"""The scenes that a network segments worst, with their true and their predicted masks."""

from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from tqdm import tqdm

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.scenes import choose_layout, open_scene
from resnest_imagenet.errors import DataError, UserError
from resnest_imagenet.evaluation.region_files import NamedRegions
from resnest_imagenet.evaluation.regions import Regions
from resnest_imagenet.inference.segment import SegmentedImage, SegmentedImages, cover_pixels
from resnest_imagenet.inference.segmenter import Segmenter, open_segmenter


@dataclass(frozen=True)
class WorstScene:
    """A scene of an evaluation.

    Attributes:
        file: the image's.
        accuracy: share of its labelled pixels whose class was predicted correctly in that evaluation, in percent.
        image: with the predicted mask; None if there is a fault.
        truth: the true mask, uint8 (H, W), class indices and VOID; None if there is a fault.
        fault: why it cannot be shown, in one line, or "".
    """

    file: str
    accuracy: float
    image: SegmentedImage | None = None
    truth: np.ndarray | None = None
    fault: str = ""


@dataclass(frozen=True)
class WorstScenes:
    """The scenes with the lowest accuracies, the lowest first.

    Attributes:
        scenes: of the evaluation.
        protocol: how the network sees the scenes of the pictures: as in the evaluation, or the whole image.
        palette: uint8 (K, 3), a colour for each class.
    """

    scenes: tuple[WorstScene, ...]
    protocol: str
    palette: np.ndarray


def rank_scenes(regions: Regions, count: int) -> list[int]:
    """Return the scenes with the lowest shares of correct pixels, the lowest first, at most `count`.

    Scenes without a labelled or without a wrong pixel are not included.
    """
    accuracy = regions.correct / np.maximum(regions.labelled, 1)
    order = np.argsort(accuracy, kind="stable")
    return order[(regions.correct < regions.labelled)[order]][:count].tolist()


def find_worst_scenes(
    evaluation: NamedRegions,
    checkpoint: str | PathLike[str],
    kind: str,
    part: str,
    count: int = 12,
    device: str | torch.device = "auto",
) -> WorstScenes:
    """Segment the worst scenes of an evaluation again, because its files do not include masks.

    Args:
        evaluation: of `read_regions`.
        checkpoint: the network that was evaluated.
        kind: the layout of the data set: ade20k, cityscapes or masks.
        part: of the data set: val.
        count: number of scenes.
        device: of the computation: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.

    Raises:
        UserError: the checkpoint cannot be used, or has other classes, or there is no such layout or device.
    """
    choose_layout(kind)
    segmenter = open_segmenter(checkpoint, device=device)
    if segmenter.classes != evaluation.classes:
        raise DataError(f"{checkpoint}: its classes are not those of the evaluation")
    regions, indices = evaluation.regions, rank_scenes(evaluation.regions, count)
    scenes = []
    for index in tqdm(indices, "the worst scenes", unit="", disable=None, dynamic_ncols=True, leave=False):
        accuracy = 100 * float(regions.correct[index] / regions.labelled[index])
        scenes.append(_view_scene(segmenter, kind, part, evaluation.files[index], accuracy))
    return WorstScenes(tuple(scenes), cover_pixels(segmenter.protocol).text, segmenter.palette)


def _view_scene(segmenter: Segmenter, kind: str, part: str, file: str, accuracy: float) -> WorstScene:
    """Return a scene with both masks, or with a fault: its files may have been moved or changed since."""
    try:
        scene = open_scene(kind, part, file, segmenter.classes, segmenter.palette)
        _, truth = scene.read(0)
        (image,) = SegmentedImages(segmenter, scene.images, (), "fp32")
    except (BadImage, UserError) as error:
        return WorstScene(file, accuracy, fault=str(error))
    return WorstScene(file, accuracy, image, truth)
