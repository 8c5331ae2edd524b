"""A comparison of detectors as a page for a browser."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from resnest_imagenet.data.decoding import BadImage, decode_upright
from resnest_imagenet.errors import UserError
from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette
from resnest_imagenet.inference.compare_objects import (
    MATCHING,
    ObjectComparison,
    describe_objects,
    list_classes_by_agreement,
)
from resnest_imagenet.inference.detect import DetectedImage
from resnest_imagenet.reports.page import LONG, render_figure, render_lines, render_page, render_table, render_views

PICTURES = 24  # at most
SIDE = 480  # longest side of each picture, in pixels
_SHARED = (150, 150, 150)  # colour of detections that all networks have


def render_object_comparison(comparison: ObjectComparison) -> str:
    """Return the HTML: the classes by their agreement, and the images whose detections differ most, side by side."""
    shown = comparison.order[:PICTURES].tolist()
    strips = Markup().join(_render_image(comparison, index) for index in shown)
    protocols = "; ".join(
        f"{name}: {protocol}" for name, protocol in zip(comparison.names, comparison.protocols, strict=True)
    )
    number = (
        f"{len(shown)} of {len(comparison.order):,}, the largest shares of detections that do not match first. "
        "What all networks find is grey."
    )
    head = Markup("<p class=verdict>{}.</p><p>{}.</p>").format(describe_objects(comparison), protocols)
    text = Markup("<p>{}</p>").format(number if shown else "Nowhere: all detections match.")
    sections = {"Classes": _render_classes(comparison), "Where they differ": text + strips}
    return render_page(" against ".join(comparison.names), head, sections)


def _render_classes(comparison: ObjectComparison) -> Markup:
    rows = [
        (comparison.classes[label], f"{comparison.agreement[label]:.2f}", *comparison.num_detections[:, label].tolist())
        for label in list_classes_by_agreement(comparison)
    ]
    head = ("class", "agreement %", *(f"{name}: detections" for name in comparison.names))
    text = (
        f"Agreement: the detections that match one of another network, of the same class and with an IoU of "
        f"{MATCHING:g} or more, of all detections; over all pairs of networks."
    )
    return Markup("<p>{}</p>{}").format(text, render_table(head, rows, is_long=len(rows) > LONG))


def _render_image(comparison: ObjectComparison, index: int) -> Markup:
    file, alone = comparison.images.name(index), comparison.num_alone[index].tolist()
    counts = zip(comparison.names, comparison.objects[index], alone, strict=True)
    text = "; ".join(f"{name}: {len(image)} detections, {count} without a match" for name, image, count in counts)
    share = f"{100 * comparison.differing[index]:.1f} % of the detections do not match"
    caption = [render_lines([f"{Path(file).name}: {share}"], "right"), render_lines([text])]
    try:
        picture = decode_upright(comparison.images.read(index))
    except (BadImage, UserError) as error:  # the file has changed since it was checked
        return render_figure(Markup(), [*caption, f"(no picture: {error})"])
    parts = zip(comparison.names, comparison.objects[index], comparison.shared[index], strict=True)
    views = [("image", _shrink(np.asarray(picture)))]
    views += [
        (name, _shrink(_draw(np.asarray(picture), image, is_shared, comparison.classes)))
        for name, image, is_shared in parts
    ]
    return render_views(views, caption)


def _draw(pixels: np.ndarray, image: DetectedImage, is_shared: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Draw the detections of one network; those that all networks have are grey, and below the others."""
    order = np.argsort(is_shared, kind="stable")
    masks = None if image.masks is None else tuple(image.masks[row] for row in order.tolist())
    shown = replace(image, pixels=pixels, masks=masks)
    labels = image.labels + len(classes) * is_shared  # the classes a second time, in grey
    palette = np.concatenate([make_box_palette(len(classes)), np.full((len(classes), 3), _SHARED, np.uint8)])
    columns = (image.boxes[order], labels[order], (*classes, *classes), palette, image.scores[order])
    return draw_detections(pixels, *columns, shown.decoded_masks)


def _shrink(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture
