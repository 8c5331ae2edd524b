"""The paper's tables of other tasks (arXiv 2004.08955) beside what this project counts and measured: Table 7."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.evaluation.results import MeasuredRegions
from resnest_imagenet.models.cost import count_deeplab
from resnest_imagenet.reports.table3 import number_note


@dataclass(frozen=True)
class PaperData:
    """A data set of a table.

    Attributes:
        name: in the table.
        num_images, num_classes: of its validation set.
        crop: side in pixels of the image whose multiply-adds are counted: that of training.
    """

    name: str
    num_images: int
    num_classes: int
    crop: int


@dataclass(frozen=True)
class DownstreamRow:
    """One row as printed.

    Attributes:
        name: in the table.
        data: the layout of its data set.
        model: the backbone, a name of models/zoo.py.
        experiment: the file of conf/experiment/ that trains it.
        paper: percent, by metric; what the paper does not tell is not there.
    """

    name: str
    data: str
    model: str
    experiment: str
    paper: dict[str, float]


@dataclass(frozen=True)
class DownstreamTable:
    """One table.

    Attributes:
        metrics: what the figures are called in the heading, by metric.
        data: the data sets, by layout.
        rows: in the paper's order.
        count: returns the parameters of a row's network, and its multiply-adds for one image.
    """

    metrics: dict[str, str]
    data: dict[str, PaperData]
    rows: Sequence[DownstreamRow]
    count: Callable[[str, PaperData], tuple[int, int]]


def count_segmentation(model: str, data: PaperData) -> tuple[int, int]:
    """Return the parameters of a DeepLabV3, and its multiply-adds for one image of the crop's size.

    The auxiliary head's parameters count, as they are in a checkpoint; it computes nothing but in training.
    """
    stages = count_deeplab(model, data.num_classes, data.crop)
    return sum(stage.parameters for stage in stages), sum(stage.multiply_adds for stage in stages)


def _row_of_table7(backbone: str, data: str, model: str, miou: float, pixel_accuracy: float | None) -> DownstreamRow:
    paper = {"miou": miou} if pixel_accuracy is None else {"miou": miou, "pixel_accuracy": pixel_accuracy}
    network = backbone.lower().replace("-", "")
    return DownstreamRow(f"DeepLabV3 {backbone}", data, model, f"deeplabv3_{network}_{data}", paper)


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


def build_downstream(table: DownstreamTable, measured: Sequence[MeasuredRegions]) -> list[dict[str, Any]]:
    """Return the rows of a table: the paper's figures, those counted now, and what was measured.

    Keys: row, data, model, experiment (a file of the repository), parameters (millions), crop, gflops (multiply-adds in
    billions at the crop), paper ({metric: percent}), measured (list of results as dictionaries).
    """
    rows = []
    for row in table.rows:
        data = table.data[row.data]
        parameters, multiply_adds = table.count(row.model, data)
        rows.append(
            {
                "row": row.name,
                "data": row.data,
                "model": row.model,
                "experiment": f"conf/experiment/{row.experiment}.yaml",
                "parameters": parameters / 1e6,
                "crop": data.crop,
                "gflops": multiply_adds / 1e9,
                "paper": row.paper,
                "measured": [asdict(result) for result in measured if _belongs(result, row)],
            }
        )
    return rows


def list_strangers(table: DownstreamTable, measured: Sequence[MeasuredRegions]) -> list[str]:
    """Return a line for each result that has no row in a table."""
    return [
        f"{result.source}: {result.model} on data={result.data} has no row"
        for result in measured
        if not any(_belongs(result, row) for row in table.rows)
    ]


def _belongs(result: MeasuredRegions, row: DownstreamRow) -> bool:
    return (result.model, result.data) == (row.model, row.data)


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
    """Return under what a figure was measured, and on what if not on the data set's validation set."""
    images = (result["count"], result["num_classes"])
    is_whole = images == (data.num_images, data.num_classes)
    others = "" if is_whole else f"; NOT {data.name}'s validation set: {images[0]} images, {images[1]} classes"
    return f"{result['recipe']}; {result['protocol']}{others}"


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
