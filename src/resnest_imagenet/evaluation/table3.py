"""Table 3 of the paper (arXiv 2004.08955) beside what this project counts and measured."""

import csv
import glob
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.cost import count_cost


@dataclass(frozen=True)
class PaperRow:
    """One row as printed.

    Attributes:
        name: in the table.
        model: the network that it is, a name of models/zoo.py.
        parameters: in millions.
        gflops: multiply-adds in billions, of one image at 224 pixels.
        top1: percent, by crop; the weights are trained at 224 for both.
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


@dataclass(frozen=True)
class Measured:
    """One accuracy that was measured here.

    Attributes:
        model: a name of models/zoo.py.
        crop: side of the images in pixels.
        top1: percent.
        count, num_classes: of the images it was measured on; ImageNet's are 50000 and 1000.
        recipe: what the weights were trained with, or where they come from.
        protocol: how the images were resized and cropped.
        source: the file that says so.
    """

    model: str
    crop: int
    top1: float
    count: int
    num_classes: int
    recipe: str
    protocol: str
    source: str


def read_measured(patterns: list[str], recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    """Read results files (of resnest-eval out=...) and run folders.

    A run folder stands for the results files in it, or without any for the evaluation after its last epoch.

    Args:
        patterns: paths, or patterns with * that may find none.
        recipes: the values of each recipe by its name: what a run changed is named.

    Raises:
        ConfigError: for a path that is not there, or is neither.
    """
    found: list[Measured] = []
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern))]
        if not paths and not glob.has_magic(pattern):
            raise ConfigError(f"results={pattern}: no such file or run folder")
        for path in paths:
            if path.is_file():
                found += _read_results(path, recipes)
            elif (path / "config.yaml").is_file():
                files = [file for file in sorted(path.glob("*.json")) if "results" in _read_json(file)]
                found += [one for file in files for one in _read_results(file, recipes)] or _read_run(path, recipes)
            elif not glob.has_magic(pattern):
                raise ConfigError(f"results={path}: neither a results file nor a run folder")
    return found


def _read_results(path: Path, recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    content = _read_json(path)
    try:
        recipe = f"weights {content['ckpt']}" if content["recipe"] is None else _describe(content["recipe"], recipes)
        return [
            Measured(
                content["model"],
                r["crop"],
                r["top1"],
                r["count"],
                content["num_classes"],
                recipe,
                r["protocol"],
                str(path),
            )
            for r in content["results"]
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"results={path}: not written by resnest-eval out=... (lacks {error})") from error


def _read_run(folder: Path, recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = folder / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    evaluations = [event for event in events if event["event"] == "eval"]
    if not evaluations:
        return []
    last, model, recipe = evaluations[-1], config["model"], _describe(config["train"], recipes)
    if last["epoch"] < config["train"]["epochs"]:
        recipe += f", after {last['epoch']} epochs"
    crop, top1, count, protocol = config["eval"]["crop"], last["top1"], last["count"], last["protocol"]
    return [Measured(model["name"], crop, top1, count, model["num_classes"], recipe, protocol, str(metrics))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"results={path}: not a readable JSON file") from error
    return content if isinstance(content, dict) else {}


def _describe(options: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> str:
    """Name the recipe, and the values that a run set otherwise."""
    name = options["recipe"]
    published = recipes.get(name, {})
    changed = [f"{key}={options.get(key)}" for key, value in published.items() if options.get(key) != value]
    return ", ".join([name if published else f"{name} (unknown)", *changed])


def build_table(measured: list[Measured]) -> list[dict[str, Any]]:
    """Return the rows: the paper's figures, those counted now, and what was measured.

    Keys: row, model, parameters_paper and parameters (millions), gflops_paper and gflops (multiply-adds in billions at
    224), top1_paper ({crop: percent}), measured (list of `Measured` as dictionaries).
    """
    rows = []
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
                "measured": [asdict(one) for one in measured if one.model == row.model],
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]], form: str) -> str:
    """Return the table as "markdown", "csv" (one line per row and accuracy) or "json"."""
    if form == "json":
        return json.dumps(rows, indent=2)
    return _format_markdown(rows) if form == "markdown" else _format_csv(rows)


def _format_markdown(rows: list[dict[str, Any]]) -> str:
    crops = sorted({224, 320}.union(one["crop"] for row in rows for one in row["measured"]))
    heads = ["row", "model", "M params: paper", "counted", "GFLOPs: paper", "counted"]
    heads += [head for crop in crops for head in _heads_of(crop)]
    notes: list[str] = []
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [row["row"], row["model"], f"{row['parameters_paper']:.1f}", f"{row['parameters']:.2f}"]
        cells += [f"{row['gflops_paper']:.3g}", f"{row['gflops']:.2f}"]
        for crop in crops:
            if crop in row["top1_paper"]:
                cells.append(f"{row['top1_paper'][crop]:.2f}")
            here = [one for one in row["measured"] if one["crop"] == crop]
            cells.append("; ".join(f"{one['top1']:.2f} [{_number(notes, _note(one))}]" for one in here))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if notes else []), *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _heads_of(crop: int) -> list[str]:
    return [f"top-1 @{crop}: paper", "here"] if crop in PAPER[0].top1 else [f"@{crop}: here"]


def _note(one: dict[str, Any]) -> str:
    """Say under what a number was measured, and on what if not on ImageNet's validation set."""
    images = (one["count"], one["num_classes"])
    data = (
        "" if images == (50000, 1000) else f"; NOT ImageNet's validation set: {images[0]} images, {images[1]} classes"
    )
    return f"{one['recipe']}; {one['protocol']}{data}"


def _number(notes: list[str], note: str) -> int:
    """Return a note's number, counted from 1; add it if it is new."""
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def _format_csv(rows: list[dict[str, Any]]) -> str:
    fixed = ["row", "model", "parameters_paper", "parameters", "gflops_paper", "gflops"]
    result = ["crop", "top1_paper", "top1", "count", "num_classes", "recipe", "protocol", "source"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*fixed, *result], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        base = {key: row[key] for key in fixed}
        paper = row["top1_paper"]
        crops = sorted({*paper, *(one["crop"] for one in row["measured"])})
        for crop in crops:
            here = [one for one in row["measured"] if one["crop"] == crop] or [{"crop": crop}]
            for one in here:
                writer.writerow({**base, "top1_paper": paper.get(crop), **{k: one[k] for k in result if k in one}})
    return text.getvalue().rstrip("\n")
