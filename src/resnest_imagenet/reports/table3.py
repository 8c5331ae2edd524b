"""Table 3 of the paper (arXiv 2004.08955) beside this project's counted and measured figures."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.evaluation.results import Measured
from resnest_imagenet.models.cost import count_cost


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table.

    Attributes:
        name: in the table.
        model: the network's name in models/zoo.py.
        parameters: in millions.
        gflops: multiply-adds in billions, for one image at 224 pixels.
        top1: percent, by crop; the weights are trained at 224 for both crops.
    """

    name: str
    model: str
    parameters: float
    gflops: float
    top1: dict[int, float]


PAPER = (
    PaperRow("ResNet-50", "resnet50", 25.5, 4.14, {224: 76.15, 320: 76.86}),
    PaperRow("ResNeXt-50", "resnext50_32x4d", 25.0, 4.24, {224: 77.77, 320: 78.95}),
    PaperRow("SENet-50", "seresnext50_32x4d", 27.7, 4.25, {224: 78.88, 320: 80.29}),
    PaperRow("ResNetD-50", "resnet50d", 25.6, 4.34, {224: 79.15, 320: 79.70}),
    PaperRow("SKNet-50", "skresnext50_32x4d", 27.5, 4.47, {224: 79.21, 320: 80.68}),
    PaperRow("ResNeSt-50-fast", "resnest50_fast_2s1x64d", 27.5, 4.34, {224: 80.64, 320: 81.43}),
    PaperRow("ResNeSt-50", "resnest50", 27.5, 5.39, {224: 81.13, 320: 81.82}),
    PaperRow("ResNet-101", "resnet101", 44.5, 7.87, {224: 77.37, 320: 78.17}),
    PaperRow("ResNeXt-101", "resnext101_32x4d", 44.3, 7.99, {224: 78.89, 320: 80.14}),
    PaperRow("SENet-101", "seresnext101_32x4d", 49.2, 8.00, {224: 79.42, 320: 81.39}),
    PaperRow("ResNetD-101", "resnet101d", 44.6, 8.06, {224: 80.54, 320: 81.26}),
    PaperRow("SKNet-101", "skresnext101_32x4d", 48.9, 8.46, {224: 79.81, 320: 81.60}),
    PaperRow("ResNeSt-101-fast", "resnest101_fast", 48.2, 8.07, {224: 81.97, 320: 82.76}),
    PaperRow("ResNeSt-101", "resnest101", 48.3, 10.2, {224: 82.27, 320: 83.00}),
)


def build_table(measured: list[Measured]) -> list[dict[str, Any]]:
    """Return the rows: the paper's figures, those counted now, and those measured here.

    Keys: row, model, parameters_paper and parameters (millions), gflops_paper and gflops (multiply-adds in billions at
    224), top1_paper ({crop: percent}), measured (list of `Measured` as dictionaries, without those that have a
    test-time augmentation: the paper's have none).
    """
    rows = []
    comparable = [result for result in measured if result.tta is None]
    for row in PAPER:
        parameters, multiply_adds = count_cost(row.model, 224)
        rows.append(
            {
                "row": row.name,
                "model": row.model,
                "parameters_paper": row.parameters,
                "parameters": parameters / 1e6,
                "gflops_paper": row.gflops,
                "gflops": multiply_adds / 1e9,
                "top1_paper": row.top1,
                "measured": [asdict(result) for result in comparable if result.model == row.model],
            }
        )
    return rows


def list_strangers(measured: list[Measured]) -> list[str]:
    """Return a line for each result that has no row, or cannot stand in it."""
    models = {row.model for row in PAPER}
    strangers = [f"{result.source}: {result.model} has no row" for result in measured if result.model not in models]
    averaged = [result for result in measured if result.model in models and result.tta is not None]
    return strangers + [
        f"{result.source}: tta={result.tta}, the paper's accuracies have no such augmentation" for result in averaged
    ]


def format_table(rows: list[dict[str, Any]], form: str) -> str:
    """Return the table as "markdown", "csv" (one line per row and accuracy) or "json"."""
    if form == "json":
        return json.dumps(rows, indent=2)
    return _format_markdown(rows) if form == "markdown" else _format_csv(rows)


def _format_markdown(rows: list[dict[str, Any]]) -> str:
    crops = sorted({224, 320}.union(result["crop"] for row in rows for result in row["measured"]))
    heads = ["row", "model", "M params: paper", "counted", "GFLOPs: paper", "counted"]
    heads += [head for crop in crops for head in _heads_of(crop)]
    notes: list[str] = []
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [row["row"], row["model"], f"{row['parameters_paper']:.1f}", f"{row['parameters']:.2f}"]
        cells += [f"{row['gflops_paper']:#.3g}", f"{row['gflops']:.2f}"]
        for crop in crops:
            if crop in row["top1_paper"]:
                cells.append(f"{row['top1_paper'][crop]:.2f}")
            results = [result for result in row["measured"] if result["crop"] == crop]
            cells.append("; ".join(f"{result['top1']:.2f} [{number_note(notes, _note(result))}]" for result in results))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if notes else []), *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _heads_of(crop: int) -> list[str]:
    return [f"top-1 @{crop}: paper", "here"] if crop in PAPER[0].top1 else [f"@{crop}: here"]


def _note(result: dict[str, Any]) -> str:
    """Return the recipe and protocol of a figure, and its images if they are not ImageNet's validation set."""
    images = (result["count"], result["num_classes"])
    data = (
        "" if images == (50000, 1000) else f"; NOT ImageNet's validation set: {images[0]} images, {images[1]} classes"
    )
    return f"{result['recipe']}; {result['protocol']}{data}"


def number_note(notes: list[str], note: str) -> int:
    """Return a note's number, counted from 1; add it if it is new."""
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def _format_csv(rows: list[dict[str, Any]]) -> str:
    fixed = ["row", "model", "parameters_paper", "parameters", "gflops_paper", "gflops"]
    of_result = ["crop", "top1_paper", "top1", "count", "num_classes", "recipe", "protocol", "source"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*fixed, *of_result], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        base = {key: row[key] for key in fixed}
        paper = row["top1_paper"]
        crops = sorted({*paper, *(result["crop"] for result in row["measured"])})
        for crop in crops:
            results = [result for result in row["measured"] if result["crop"] == crop] or [{"crop": crop}]
            for result in results:
                measured = {key: guard(result[key]) for key in of_result if key in result}
                writer.writerow({**base, "top1_paper": paper.get(crop), **measured})
    return text.getvalue().rstrip("\n")
