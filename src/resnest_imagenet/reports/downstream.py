"""Tables 5, 6 and 7 of the paper (arXiv 2004.08955) beside this project's counted and measured figures."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeAlias

from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.evaluation.results import MeasuredBoxes, MeasuredRegions
from resnest_imagenet.models.cost import StageCost, count_deeplab, count_rcnn
from resnest_imagenet.reports.table3 import number_note

MeasuredDownstream: TypeAlias = MeasuredRegions | MeasuredBoxes


@dataclass(frozen=True)
class PaperData:
    """A data set of a table.

    Attributes:
        name: in the table.
        num_images, num_classes: of its validation set.
        crop: side of the training images, or their (height, width), in pixels; the multiply-adds are counted for it.
    """

    name: str
    num_images: int
    num_classes: int
    crop: int | tuple[int, int]

    @property
    def shown_crop(self) -> int | str:
        """The crop in print."""
        return self.crop if isinstance(self.crop, int) else "x".join(map(str, self.crop))


@dataclass(frozen=True)
class DownstreamRow:
    """One row of the paper's table.

    Attributes:
        name: in the table.
        data: the layout of its data set.
        model: the backbone, a name of models/zoo.py.
        experiment: the file of conf/experiment/ that trains it.
        paper: percent, by metric, without metrics that the paper does not give.
        detector: the kind of a detector, see `models.rcnn_options.name_detector`; "" for other networks.
    """

    name: str
    data: str
    model: str
    experiment: str
    paper: dict[str, float]
    detector: str = ""


@dataclass(frozen=True)
class DownstreamTable:
    """One table.

    Attributes:
        metrics: the names of the metrics in the heading, by metric.
        data: the data sets, by layout.
        rows: in the paper's order.
        count: returns the parameters of a row's network, and its multiply-adds for one image.
    """

    metrics: dict[str, str]
    data: dict[str, PaperData]
    rows: Sequence[DownstreamRow]
    count: Callable[[DownstreamRow, PaperData], tuple[int, int]]


def count_segmentation(row: DownstreamRow, data: PaperData) -> tuple[int, int]:
    """Return the parameters of a DeepLabV3, and its multiply-adds for one image of the crop's size.

    The auxiliary head's parameters are counted, as a checkpoint has them; it adds no multiply-adds outside training.
    """
    assert isinstance(data.crop, int)
    stages = count_deeplab(row.model, data.num_classes, data.crop)
    return sum(stage.parameters for stage in stages), sum(stage.multiply_adds for stage in stages)


def count_detection(row: DownstreamRow, data: PaperData) -> tuple[int, int]:
    """Return the parameters of a detector, and its multiply-adds for one image with 1000 proposals and 100 masks."""
    assert isinstance(data.crop, tuple)
    stages = _count_with_masks(row.model, data.num_classes, data.crop, row.detector.startswith("cascade"))
    counted = [stage for stage in stages if row.detector.endswith("mask") or stage.stage != "masks"]
    return sum(stage.parameters for stage in counted), sum(stage.multiply_adds for stage in counted)


@cache
def _count_with_masks(model: str, num_classes: int, size: tuple[int, int], cascade: bool) -> list[StageCost]:
    """Return the cost of a detector's parts, cached for the rows with and without masks: counting takes seconds."""
    return count_rcnn(model, num_classes, size, cascade=cascade, masks=True)


def _row_of_table7(backbone: str, data: str, model: str, miou: float, pixel_accuracy: float | None) -> DownstreamRow:
    paper = {"miou": miou} if pixel_accuracy is None else {"miou": miou, "pixel_accuracy": pixel_accuracy}
    network = backbone.lower().replace("-", "")
    return DownstreamRow(f"DeepLabV3 {backbone}", data, model, f"deeplabv3_{network}_{data}", paper)


def _row_of_coco(detector: str, backbone: str, box_ap: float, mask_ap: float | None = None) -> DownstreamRow:
    network = backbone.lower().replace("-", "")
    model = network.replace("resnet50", "resnet50_msra").replace("resnet101", "resnet101_msra")
    title = f"{detector.replace('_', ' ').title()} R-CNN {backbone}"
    paper = {"box_ap": box_ap} if mask_ap is None else {"box_ap": box_ap, "mask_ap": mask_ap}
    return DownstreamRow(title, "coco", model, f"{detector}_rcnn_{network}", paper, detector)


_COCO = {"coco": PaperData("COCO", num_images=5000, num_classes=80, crop=(800, 1344))}

TABLE5 = DownstreamTable(
    metrics={"box_ap": "box AP"},
    data=_COCO,
    rows=(
        _row_of_coco("faster", "ResNet-50", 39.25),
        _row_of_coco("faster", "ResNet-101", 41.37),
        _row_of_coco("faster", "ResNeSt-50", 42.33),
        _row_of_coco("faster", "ResNeSt-101", 44.72),
        _row_of_coco("cascade", "ResNet-50", 42.52),
        _row_of_coco("cascade", "ResNet-101", 44.03),
        _row_of_coco("cascade", "ResNeSt-50", 45.41),
        _row_of_coco("cascade", "ResNeSt-101", 47.50),
        _row_of_coco("cascade", "ResNeSt-200", 49.03),
    ),
    count=count_detection,
)
TABLE6 = DownstreamTable(
    metrics={"box_ap": "box AP", "mask_ap": "mask AP"},
    data=_COCO,
    rows=(
        _row_of_coco("mask", "ResNet-50", 39.97, 36.05),
        _row_of_coco("mask", "ResNet-101", 41.78, 37.51),
        _row_of_coco("mask", "ResNeSt-50", 42.81, 38.14),
        _row_of_coco("mask", "ResNeSt-101", 45.75, 40.65),
        _row_of_coco("cascade_mask", "ResNet-50", 43.06, 37.19),
        _row_of_coco("cascade_mask", "ResNet-101", 44.79, 38.52),
        _row_of_coco("cascade_mask", "ResNeSt-50", 46.19, 39.55),
        _row_of_coco("cascade_mask", "ResNeSt-101", 48.30, 41.56),
    ),
    count=count_detection,
)
TABLE7 = DownstreamTable(
    metrics={"miou": "mIoU", "pixel_accuracy": "pixAcc"},
    data={
        "ade20k": PaperData("ADE20K", num_images=2000, num_classes=150, crop=480),
        "cityscapes": PaperData("Cityscapes", num_images=500, num_classes=19, crop=768),
    },
    rows=(
        _row_of_table7("ResNet-50", "ade20k", "resnet50s", 42.10, 80.39),
        _row_of_table7("ResNet-101", "ade20k", "resnet101s", 44.14, 81.11),
        _row_of_table7("ResNeSt-50", "ade20k", "resnest50", 45.12, 81.17),
        _row_of_table7("ResNeSt-101", "ade20k", "resnest101", 46.91, 82.07),
        _row_of_table7("ResNet-50", "cityscapes", "resnet50s", 78.72, None),
        _row_of_table7("ResNet-101", "cityscapes", "resnet101s", 79.42, None),
        _row_of_table7("ResNeSt-50", "cityscapes", "resnest50", 79.87, None),
        _row_of_table7("ResNeSt-101", "cityscapes", "resnest101", 80.42, None),
    ),
    count=count_segmentation,
)


def build_downstream(table: DownstreamTable, measured: Sequence[MeasuredDownstream]) -> list[dict[str, Any]]:
    """Return the rows of a table: the paper's figures, those counted now, and those measured here.

    Keys: row, data, model, experiment (a file of the repository), parameters (millions), crop, gflops (multiply-adds in
    billions at the crop), paper ({metric: percent}), measured (list of results as dictionaries).
    """
    rows = []
    for row in table.rows:
        data = table.data[row.data]
        parameters, multiply_adds = table.count(row, data)
        rows.append(
            {
                "row": row.name,
                "data": row.data,
                "model": row.model,
                "experiment": f"conf/experiment/{row.experiment}.yaml",
                "parameters": parameters / 1e6,
                "crop": data.shown_crop,
                "gflops": multiply_adds / 1e9,
                "paper": row.paper,
                "measured": [asdict(result) for result in measured if _belongs(result, row)],
            }
        )
    return rows


def list_strangers(table: DownstreamTable, measured: Sequence[MeasuredDownstream]) -> list[str]:
    """Return a line for each result that has no row in a table."""
    return [
        f"{result.source}: {_name_network(result)} on data={result.data} has no row"
        for result in measured
        if not any(_belongs(result, row) for row in table.rows)
    ]


def _name_network(result: MeasuredDownstream) -> str:
    return f"{result.detector} with {result.model}" if isinstance(result, MeasuredBoxes) else result.model


def _belongs(result: MeasuredDownstream, row: DownstreamRow) -> bool:
    detector = result.detector if isinstance(result, MeasuredBoxes) else ""
    return (result.model, result.data, detector) == (row.model, row.data, row.detector)


def format_downstream(table: DownstreamTable, rows: list[dict[str, Any]], form: str) -> str:
    """Return a table as "markdown", "csv" (one line per result, or per row without one) or "json"."""
    if form == "json":
        return json.dumps(rows, indent=2)
    return _format_markdown(table, rows) if form == "markdown" else _format_csv(table, rows)


def _format_markdown(table: DownstreamTable, rows: list[dict[str, Any]]) -> str:
    heads = ["row", "data", "experiment", "M params: counted", "GFLOPs: counted"]
    heads += [head for name in table.metrics.values() for head in (f"{name}: paper", "here")]
    notes: list[str] = []
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    for row in rows:
        data = table.data[row["data"]]
        experiment = f"[{row['model']}]({row['experiment']})"
        cells = [row["row"], data.name, experiment, f"{row['parameters']:.2f}", f"{row['gflops']:.1f} @{row['crop']}"]
        marked = [(result, number_note(notes, _note(result, data))) for result in row["measured"]]
        for metric in table.metrics:
            cells.append(f"{row['paper'][metric]:.2f}" if metric in row["paper"] else "")
            cells.append("; ".join(f"{result[metric]:.2f} [{number}]" for result, number in marked))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if notes else []), *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _note(result: dict[str, Any], data: PaperData) -> str:
    """Return the recipe and protocol of a figure, and its images if they are not the data set's validation set."""
    images = (result["count"], result["num_classes"])
    is_whole = images == (data.num_images, data.num_classes)
    warning = "" if is_whole else f"; NOT {data.name}'s validation set: {images[0]} images, {images[1]} classes"
    return f"{result['recipe']}; {result['protocol']}{warning}"


def _format_csv(table: DownstreamTable, rows: list[dict[str, Any]]) -> str:
    fixed = ["row", "data", "model", "experiment", "parameters", "crop", "gflops"]
    of_paper = {metric: f"{metric}_paper" for metric in table.metrics}
    of_result = [*table.metrics, "count", "num_classes", "recipe", "protocol", "source"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*fixed, *of_paper.values(), *of_result], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        base = {key: row[key] for key in fixed}
        base |= {of_paper[metric]: percent for metric, percent in row["paper"].items()}
        for result in row["measured"] or [{}]:
            writer.writerow({**base, **{key: guard(result[key]) for key in of_result if key in result}})
    return text.getvalue().rstrip("\n")
