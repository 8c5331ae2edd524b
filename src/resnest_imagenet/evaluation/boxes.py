"""How well a detector finds the objects of a set: COCO's average precision of boxes and of masks.

Two libraries compute it. pycocotools is the reference, for figures that are published. hotcoco gives the same figures
in a hundredth of the time, so it evaluates each epoch. Both get images, classes and objects numbered from 1, in the
order of the data set's own numbers: the libraries treat the number 0, and one that occurs twice, in different ways.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import import_extra
from resnest_imagenet.evaluation.detections import DetectionTable, Kind, detect_over_ranks
from resnest_imagenet.evaluation.ground_truth import GroundTruth
from resnest_imagenet.evaluation.masks import measure_area

IOUS = tuple((50 + 5 * step) / 100 for step in range(10))  # .50 to .95: the overlap that a detection needs
RECALLS = tuple(step / 100 for step in range(101))  # at which precision is read
AREAS = ("all", "small", "medium", "large")  # to 32 x 32 pixels, to 96 x 96, above
MOST = (1, 10, 100)  # largest numbers of detections of an image and class

Evaluator = Literal["hotcoco", "pycocotools"]


class Figure(NamedTuple):
    """One of COCO's twelve figures.

    Attributes:
        is_recall: true: the highest recall, averaged over IoUs and classes; false: the precision, averaged over recalls
            too.
        iou: at this IoU only; None: the mean over all.
        area: objects of this size.
        most: largest number of detections of an image and class.
    """

    is_recall: bool
    iou: float | None = None
    area: str = "all"
    most: int = 100


# In the order in which pycocotools has them.
FIGURES = {
    "ap": Figure(False),
    "ap50": Figure(False, 0.5),
    "ap75": Figure(False, 0.75),
    **{f"ap_{area}": Figure(False, area=area) for area in AREAS[1:]},
    **{f"ar{most}": Figure(True, most=most) for most in MOST},
    **{f"ar_{area}": Figure(True, area=area) for area in AREAS[1:]},
}


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """How well K classes are found in a set.

    Attributes:
        kind: whether boxes or masks were compared.
        precision: float64 (10, 101, K, 4, 3) by IoU, recall, class, area and number of detections: the highest
            precision at this recall or above, 0..1; -1 if a class has no objects of this area.
        recall: float64 (10, K, 4, 3), the highest recall; -1 likewise.
    """

    kind: Kind
    precision: np.ndarray
    recall: np.ndarray

    def _select(self, figure: Figure) -> np.ndarray:
        """Return the values to average for a figure, float64 (..., K)."""
        ious = slice(None) if figure.iou is None else [IOUS.index(figure.iou)]
        values = self.recall if figure.is_recall else self.precision
        return values[ious][..., AREAS.index(figure.area), MOST.index(figure.most)]

    @property
    def figures(self) -> dict[str, float | None]:
        """The twelve figures in percent, by the names of FIGURES; None if no class has such objects."""
        return {name: _average(self._select(figure)) for name, figure in FIGURES.items()}

    def per_class(self, name: str) -> np.ndarray:
        """Return one of FIGURES for each class in percent, float64 (K,); NaN if a class has no such objects."""
        values = self._select(FIGURES[name])
        columns = values.reshape(-1, values.shape[-1]).T
        return np.array([np.nan if average is None else average for average in map(_average, columns)])

    def precision_at(self, iou: float | None) -> np.ndarray:
        """Return the precision of each class at each of RECALLS in percent, float64 (K, 101); NaN without objects.

        Args:
            iou: one of IOUS; None: the mean over all.
        """
        precision = self.precision[:, :, :, 0, -1]
        precision = precision.mean(0) if iou is None else precision[IOUS.index(iou)]
        return np.where(precision < 0, np.nan, 100 * precision).T

    def values(self) -> dict[str, float | None]:
        """Return the twelve figures in percent under their names in a run's log: box_ap, box_ap50, ..., mask_ap, ..."""
        return {f"{self.kind}_{name}": figure for name, figure in self.figures.items()}


def _average(values: np.ndarray) -> float | None:
    present = values[values > -1]
    return float(100 * np.mean(present)) if present.size else None


@dataclass(frozen=True, eq=False)
class BoxScores:
    """A detector's detections in a set, and their average precision.

    Attributes:
        detections: of the whole set.
        boxes: average precision of boxes.
        masks: average precision of masks; None: it finds boxes only.
    """

    detections: DetectionTable
    boxes: AveragePrecision
    masks: AveragePrecision | None = None

    @property
    def kinds(self) -> tuple[AveragePrecision, ...]:
        """Average precision of boxes, and of masks if there are any."""
        return (self.boxes,) if self.masks is None else (self.boxes, self.masks)

    def values(self) -> dict[str, float | None]:
        """Return the figures of boxes, and of masks, in percent by their names in a run's log."""
        return {name: figure for kind in self.kinds for name, figure in kind.values().items()}


def measure_boxes(
    network: nn.Module,
    loader: Loader,
    ranks: Ranks,
    truth: GroundTruth,
    precision: str = "fp32",
    before_batch: Callable[[int, bool], None] = lambda batch, is_everywhere: None,
    name: Callable[[int], str] = str,
    *,
    masks: bool,
    evaluator: Evaluator = "hotcoco",
) -> BoxScores:
    """Evaluate a detector over all ranks; every rank returns the same.

    Args:
        network: see `detect_over_ranks`.
        loader: this rank's share of the set.
        ranks: who takes part.
        truth: of the set, with masks if these are evaluated.
        precision: fp32, bf16 or fp16.
        before_batch: see `detect_over_ranks`.
        name: of an image, by its index.
        masks: whether to evaluate masks, which the network must find.
        evaluator: which library computes the figures.

    Raises:
        NonFiniteError, RuntimeError: see `detect_over_ranks`.
        ConfigError: the libraries are not installed.
    """
    table = detect_over_ranks(network, loader, ranks, precision, before_batch, name)
    return score_detections(table, truth, masks=masks, evaluator=evaluator)


def score_detections(
    table: DetectionTable, truth: GroundTruth, *, masks: bool, evaluator: Evaluator = "hotcoco"
) -> BoxScores:
    """Compare detections with the objects of their set; see `measure_boxes`."""
    boxes = average_precision(table, truth, "box", evaluator)
    return BoxScores(table, boxes, average_precision(table, truth, "mask", evaluator) if masks else None)


def average_precision(
    table: DetectionTable, truth: GroundTruth, kind: Kind, evaluator: Evaluator = "hotcoco"
) -> AveragePrecision:
    """Return COCO's average precision.

    Args:
        table: the detections; with masks if these are compared.
        truth: the objects; with masks likewise.
        kind: whether to compare boxes or masks.
        evaluator: which library computes it.

    Raises:
        ConfigError: the library is not installed.
    """
    if kind == "mask" and len(table) and table.masks is None:
        raise ValueError("the network finds no masks")
    numbered = _Numbered(table, truth, kind)
    compute = _ask_hotcoco if evaluator == "hotcoco" else _ask_pycocotools
    precision, recall = compute(numbered)
    labels = _rank(truth.category_ids) - 1
    return AveragePrecision(kind, precision[:, :, labels], recall[:, labels])


def _rank(numbers: np.ndarray) -> np.ndarray:
    """Return the rank of each number among all of them, from 1 on."""
    places = np.empty(len(numbers), np.int64)
    places[np.argsort(numbers, kind="stable")] = np.arange(1, len(numbers) + 1)
    return places


class _Numbered:
    """Detections and objects as columns, with images, classes and objects numbered from 1.

    Equal scores are ordered by image, in the order of the data set's own numbers.
    """

    def __init__(self, table: DetectionTable, truth: GroundTruth, kind: Kind) -> None:
        self.iou_type = "bbox" if kind == "box" else "segm"
        images, categories = _rank(truth.image_ids), _rank(truth.category_ids)
        sizes = truth.sizes.tolist()
        self.images = [
            {"id": number, "height": height, "width": width}
            for number, (height, width) in zip(images.tolist(), sizes, strict=True)
        ]
        self.categories = [
            {"id": number, "name": name} for number, name in zip(categories.tolist(), truth.classes, strict=True)
        ]
        self.truth = truth
        self.true_ids = np.arange(1, len(truth) + 1)
        self.true_images, self.true_categories = images[truth.images], categories[truth.labels]
        self.detected_images, self.detected_categories = images[table.images], categories[table.labels]
        self.detected_boxes, self.scores = table.boxes, table.scores
        self.true_codes = self.detected_codes = None
        if kind == "mask":
            assert truth.masks is not None, "the objects were read without masks"
            self.true_codes = self._name_sizes(truth.images, truth.masks)
            self.detected_codes = self._name_sizes(table.images, table.masks or ())

    def _name_sizes(self, images: np.ndarray, codes: tuple[bytes, ...]) -> list[Any]:
        sizes = self.truth.sizes[images].tolist()
        return [{"size": size, "counts": counts} for size, counts in zip(sizes, codes, strict=True)]

    def list_objects(self) -> Iterator[dict[str, Any]]:
        """Yield the objects in the form of an annotation file."""
        truth = self.truth
        numbers = (self.true_ids, self.true_images, self.true_categories, truth.boxes, truth.areas, truth.crowds)
        columns = zip(*(column.tolist() for column in numbers), strict=True)
        for row, (number, image, category, box, area, is_crowd) in enumerate(columns):
            annotation = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area}
            annotation["iscrowd"] = int(is_crowd)
            if self.true_codes is not None:
                annotation["segmentation"] = self.true_codes[row]
            yield annotation

    def list_results(self) -> Iterator[dict[str, Any]]:
        """Yield the detections in the form of a results file: boxes, or masks without boxes."""
        columns = (self.detected_images, self.detected_categories, self.detected_boxes, self.scores)
        for row, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            image, category, box, score = values
            result = {"image_id": image, "category_id": category, "score": score}
            yield result | (
                {"bbox": box} if self.detected_codes is None else {"segmentation": self.detected_codes[row]}
            )


def _ask_hotcoco(numbered: _Numbered) -> tuple[np.ndarray, np.ndarray]:
    """Return precision and recall as `AveragePrecision` has them; the classes are in the order of their numbers."""
    hotcoco = import_extra("hotcoco")
    truth = numbered.truth
    objects = hotcoco.COCO.from_arrays(
        *(numbered.images, numbered.categories),
        *(numbered.true_images, numbered.true_categories, truth.boxes),
        ids=numbered.true_ids,
        area=truth.areas,
        iscrowd=truth.crowds.astype(np.int64),
        segmentation=numbered.true_codes,
    )
    columns = (numbered.detected_images, *numbered.detected_boxes.T, numbered.scores, numbered.detected_categories)
    results = objects.load_res(np.stack(columns, axis=1), segmentation=numbered.detected_codes)
    if numbered.detected_codes:
        # hotcoco would take the areas of the boxes.
        areas = [measure_area(code["counts"], code["size"]) for code in numbered.detected_codes]
        results.update_anns(ids=np.arange(1, len(areas) + 1), area=np.array(areas, np.float64))
    evaluation = hotcoco.COCOeval(objects, results, numbered.iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    content = evaluation.eval
    assert content is not None
    return np.asarray(content["precision"]), np.asarray(content["recall"])


def _ask_pycocotools(numbered: _Numbered) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `_ask_hotcoco`."""
    coco, cocoeval = import_extra("pycocotools.coco"), import_extra("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        objects = coco.COCO()
        objects.dataset = {"images": numbered.images, "categories": numbered.categories}
        objects.dataset["annotations"] = list(numbered.list_objects())
        objects.createIndex()
        rows = list(numbered.list_results())
        results = objects.loadRes(rows) if rows else coco.COCO()  # it fails on an empty list
        evaluation = cocoeval.COCOeval(objects, results, numbered.iou_type)
        if not rows:
            results.dataset = objects.dataset | {"annotations": []}
            results.createIndex()
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]
