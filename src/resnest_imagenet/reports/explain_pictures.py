"""Draws explanations as pictures."""

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.files import naming_storage_errors, write_atomically
from resnest_imagenet.inference.explain import ClassMap, Explanation, Explanations
from resnest_imagenet.reports.page import render, render_page
from resnest_imagenet.reports.picture_files import shorten_paths

# Colours of the splits: Okabe and Ito's, which colour-blind people can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
HEAT = "inferno"  # its lightness rises, so colour-blind people can read it
WIDEST = 8  # blocks side by side
OPACITY = 0.45  # of a map where the evidence is largest
PAGE = "index.html"
# Names of files and classes may have dollar signs: they are not formulas.
PLAIN: dict[str, Any] = {"parse_math": False}


def write_pictures(out: Path, explanations: Explanations) -> list[str]:
    """Draw each image's maps and attention, then the attention over all images; return lines about the files.

    Args:
        out: the folder.
        explanations: of at least one image.

    Raises:
        StorageError: a file cannot be written.
    """
    model, files = explanations.classifier.name, explanations.files
    rows: list[dict[str, str]] = []  # of the page
    progress = tqdm(explanations, unit="image", disable=None, dynamic_ncols=True, leave=False)
    by_image: list[dict[str, np.ndarray]] = []  # 30 KB per image of a ResNeSt-50
    for name, explanation in zip(name_pictures(files), progress, strict=True):
        _write(out / "maps" / name, encode_png(draw_maps(explanation, explanations.layer)))
        if explanation.attention:
            _write(out / "attention" / name, encode_png(draw_attention(explanation)))
        by_image.append(explanation.attention)
        rows.append(_describe(explanation, name))
    _write(out / PAGE, _render_page(explanations, rows).encode(errors="surrogateescape"))
    lines = [f"pictures in {out}/maps: {len(files)}"]
    if not by_image[0]:
        return [*lines, f"{model} has no split attention to draw", f"a page of them: {out}/{PAGE}"]
    attention = {block: np.stack([of_image[block] for of_image in by_image]) for block in by_image[0]}
    _write(out / "attention.csv", encode_csv(files, attention).encode(errors="surrogateescape"))
    _write(out / "attention.png", encode_png(draw_summary(model, attention)))
    return [
        *lines,
        f"pictures in {out}/attention: {len(files)}",
        f"over all images: {out}/attention.png and {out}/attention.csv",
        f"a page of them: {out}/{PAGE}",
    ]


def _describe(explanation: Explanation, name: str) -> dict[str, str]:
    """Return what the page has about an image; `name` is that of its pictures."""
    classes = ", ".join(f"{class_map.name} {100 * class_map.probability:.1f} %" for class_map in explanation.maps)
    attention = _link(f"attention/{name}") if explanation.attention else ""
    return {"file": explanation.file, "classes": classes, "map": _link(f"maps/{name}"), "attention": attention}


def _link(path: str) -> str:
    return quote(path.encode(errors="surrogateescape"))


def _render_page(explanations: Explanations, images: Sequence[dict[str, str]]) -> str:
    classifier, layer = explanations.classifier, explanations.layer
    text = (
        f"{len(images):,} images as {classifier.name} sees them, and where it finds a class: Grad-CAM of {layer}. Each "
        "map has its own scale: it shows where the evidence is, and the probability how much there is."
    )
    summary = "attention.png" if any(image["attention"] for image in images) else ""
    return render_page(
        f"{classifier.name}: explanations", render("explain.html", text=text, summary=summary, images=images)
    )


def name_pictures(files: Sequence[str]) -> list[str]:
    """Return a file name for the picture of each image: its path below the images' common folder, and .png."""
    return [f"{path}.png" for path in shorten_paths(files)]


def encode_csv(files: Sequence[str], attention: dict[str, np.ndarray]) -> str:
    """Return a row for each image, block and split: mean and standard deviation of the weights over the channels.

    Args:
        files: of the N images.
        attention: the weights, (N, R, C) by block.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "block", "split", "mean", "std"])
    for row, file in enumerate(files):
        for block, weights in attention.items():
            for split, values in enumerate(weights[row], 1):
                writer.writerow([guard(file), block, split, f"{values.mean():.6f}", f"{values.std():.6f}"])
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    with naming_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(content)


def encode_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font lacks are drawn as boxes
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw_maps(explanation: Explanation, layer: str) -> Figure:
    """Draw an image as the network sees it and, beside it, the map of each class.

    Each map has its own scale, so it shows only where the evidence is; the probability shows how much there is.

    Args:
        explanation: of the image.
        layer: the layer of the maps.
    """
    maps = explanation.maps
    figure = Figure(figsize=(3.2 * (1 + len(maps)) + 0.8, 3.8), layout="constrained")
    figure.suptitle(_printable(Path(explanation.file).name), x=0.01, ha="left", fontsize=9, **PLAIN)
    panels = figure.subplots(1, 1 + len(maps)).tolist()
    for panel in panels:
        panel.set_axis_off()
    panels[0].imshow(explanation.pixels)
    side = len(explanation.pixels)
    panels[0].set_title(f"what the network sees\n{side} x {side} pixels", fontsize=9)
    for panel, class_map in zip(panels[1:], maps, strict=True):
        _draw_map(panel, explanation.pixels, class_map)
    bar = figure.colorbar(ScalarMappable(cmap=HEAT), ax=panels, shrink=0.8)
    bar.set_ticks([0, 1], labels=["none", "most"], fontsize=8)
    height, width = maps[0].evidence.shape
    bar.set_label(f"evidence for the class\n({layer}, {height} x {width} places)", fontsize=9)
    return figure


def _draw_map(panel: Axes, pixels: np.ndarray, class_map: ClassMap) -> None:
    """Draw a map over the image; the image is grey, so all colours are the map's."""
    height, width = pixels.shape[:2]
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    panel.imshow(pixels.mean(2), cmap="gray", vmin=0, vmax=255)
    evidence, most = class_map.evidence, float(class_map.evidence.max())
    panel.imshow(evidence, HEAT, vmin=0, vmax=most or 1, alpha=OPACITY, interpolation="bilinear", extent=edges)
    title = f"{_printable(class_map.name)}\n{100 * class_map.probability:.2f} %"
    panel.set_title(title if most else f"{title}, zero everywhere", fontsize=9, **PLAIN)


def draw_attention(explanation: Explanation) -> Figure:
    """Draw the weights of the splits in one image, by channel; each layer has one row of blocks, or several.

    Within a block, channels are grouped by the split with the largest weight, and sorted by that weight.
    """
    layers: dict[str, list[tuple[str, np.ndarray]]] = {}
    for block, weights in explanation.attention.items():
        layers.setdefault(block.partition(".")[0], []).append((block, weights))
    rows = [blocks[start : start + WIDEST] for blocks in layers.values() for start in range(0, len(blocks), WIDEST)]
    columns = max(map(len, rows))
    figure = Figure(figsize=(max(7, 1.5 * columns), 1.5 * len(rows) + 1.2), layout="constrained")
    best = explanation.maps[0]
    title = f"{_printable(Path(explanation.file).name)}: {_printable(best.name)}, {100 * best.probability:.2f} %"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, **PLAIN)
    for panel, blocks in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0].tolist(), rows, strict=True):
        _draw_blocks(panel, blocks)
        panel.set_xlim(0, columns - 0.06)
    figure.supxlabel("channels of each block, sorted; the mean weight of split 1 ± standard deviation", fontsize=9)
    figure.supylabel("weights of the splits (lines: their means)", fontsize=9)
    _add_legend(figure, len(rows[0][0][1]))
    return figure


def _draw_blocks(panel: Axes, blocks: list[tuple[str, np.ndarray]]) -> None:
    for place, (_, weights) in enumerate(blocks):
        largest, split = weights.max(0), weights.argmax(0)
        order = np.lexsort((np.where(split == 0, -largest, largest), split))
        x = np.linspace(place, place + 0.94, len(order))
        panel.stackplot(x, weights[:, order], colors=COLOURS)
        panel.hlines(weights.mean(1).cumsum()[: max(1, len(weights) - 1)], x[0], x[-1], "black")
    panel.set_ylim(0, 1)
    panel.spines[:].set_visible(False)
    panel.set_xticks(
        [place + 0.47 for place in range(len(blocks))],
        [f"{name}\n{weights[0].mean():.2f} ± {weights[0].std():.2f}" for name, weights in blocks],
    )
    panel.tick_params(labelsize=8)


def draw_summary(model: str, attention: dict[str, np.ndarray]) -> Figure:
    """Draw each block's mean weight of every split over all images, and what these weights depend on.

    Args:
        model: the network's name.
        attention: the weights, (N, R, C) by block.
    """
    number, radix, _ = next(iter(attention.values())).shape
    figure = Figure(figsize=(min(max(7, 0.5 * len(attention)), 16), 6), layout="constrained")
    title = f"split attention of {model}, {number} image{'s' * (number > 1)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    upper, lower = figure.subplots(2, 1, sharex=True).tolist()
    places = np.arange(len(attention))
    means = np.array([weights.mean((0, 2)) for weights in attention.values()])  # (blocks, R)
    for split in range(radix):
        upper.bar(places, means[:, split], bottom=means[:, :split].sum(1), color=COLOURS[split % len(COLOURS)])
        if split > 0:
            upper.axhline(split / radix, color="black", linestyle="dotted")
    upper.set_ylim(0, 1)
    upper.set_ylabel("mean weight of each split" + "\n(dotted: equal)" * (radix > 1), fontsize=9)
    _add_legend(figure, radix)
    # The mean over splits of the deviation between channels; it has the unit of a weight, and so has the next one.
    of_channels = [weights.mean(0).std(1).mean() for weights in attention.values()]
    lower.bar(places - 0.2, of_channels, 0.4, color="#56b4e9", label="on the channel (between channels)")
    if number > 1:
        of_images = [weights.std(0).mean() for weights in attention.values()]
        lower.bar(places + 0.2, of_images, 0.4, color="#d55e00", label="on the image (between images): it selects")
    lower.set_ylabel("what a weight depends on\n(standard deviation)", fontsize=9)
    lower.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
    lower.set_xticks(places, [*attention], rotation=90 if len(attention) > WIDEST else 0)
    lower.set_xlim(-0.6, len(attention) - 0.4)
    for panel in (upper, lower):
        panel.tick_params(labelsize=8)
    return figure


def _add_legend(figure: Figure, radix: int) -> None:
    handles = [Patch(color=COLOURS[split % len(COLOURS)], label=f"split {split + 1}") for split in range(radix)]
    figure.legend(handles=handles, loc="outside upper right", ncols=radix, fontsize=8, frameon=False)


def _printable(name: str) -> str:
    """Return a name that can be drawn: bytes that are not characters are replaced."""
    return name.encode(errors="replace").decode()
