"""A comparison of masks as a page for a browser."""

from html import escape
from pathlib import Path

import numpy as np

from resnest_imagenet.data.decoding import BadImage, decode_by_pillow
from resnest_imagenet.errors import UserError
from resnest_imagenet.inference.compare_masks import MaskComparison, describe_difference, list_classes_by_overlap
from resnest_imagenet.reports.page import render_page
from resnest_imagenet.reports.scene_strips import render_legend, render_strip

PICTURES = 24  # at most


def render_mask_comparison(comparison: MaskComparison) -> str:
    """Return the HTML: the classes by their overlap, and the images whose masks differ most."""
    shown = comparison.order[:PICTURES].tolist()
    labels = {label for index in shown for label in np.unique(comparison.read_masks(index)).tolist()}
    strips = "".join(_render_image(comparison, index) for index in shown)
    protocols = "; ".join(
        f"{name}: {protocol}" for name, protocol in zip(comparison.names, comparison.protocols, strict=True)
    )
    number = f"{len(shown)} of {len(comparison.order):,}, the largest shares of differing pixels first."
    body = f"""<p>{escape(describe_difference(comparison))}. {escape(protocols)}.</p>
{_render_classes(comparison)}
<h2>Where they differ</h2>
<p>{number if shown else "Nowhere: all masks are equal."}</p>
{render_legend(comparison.classes, comparison.palette, labels)}
{strips}"""
    return render_page(" against ".join(comparison.names), body)


def _render_classes(comparison: MaskComparison) -> str:
    total = max(int(comparison.pixels[0].sum()), 1)
    rows = []
    for label in list_classes_by_overlap(comparison):
        overlap = comparison.overlap[label]
        cells = "".join(f"<td>{100 * pixels / total:.2f}</td>" for pixels in comparison.pixels[:, label])
        rows.append(
            f"<tr><td>{escape(comparison.classes[label])}</td>"
            f'<td><meter value="{overlap:.4f}" max="100"></meter> {overlap:.2f}</td>{cells}</tr>'
        )
    heads = "".join(f"<th>{escape(name)}: pixels, %</th>" for name in comparison.names)
    return f"""<p>Overlap: of the pixels that any network gives a class, the share that all networks give it.</p>
<div class="wide"><table><thead><tr><th>class</th><th>overlap %</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>"""


def _render_image(comparison: MaskComparison, index: int) -> str:
    file, differing = comparison.images.name(index), 100 * comparison.differing[index]
    caption = [f"<div class=right>{escape(Path(file).name)}: {differing:.1f} % of the pixels differ</div>"]
    disagreement = comparison.disagreements[index]
    if disagreement:
        pairs = zip(comparison.names, disagreement[0], strict=True)
        text = ", ".join(f"{name}: {title}" for name, title in pairs)
        caption.append(f"<div>{100 * disagreement[1]:.1f} %: {escape(text)}</div>")
    try:
        pixels = decode_by_pillow(comparison.images.read(index))
    except (BadImage, UserError) as error:  # the file has changed since it was segmented
        return f"<figure><figcaption>{''.join(caption)}(no picture: {escape(str(error))})</figcaption></figure>"
    masks = zip(comparison.names, comparison.read_masks(index), strict=True)
    return render_strip(pixels, masks, comparison.palette, caption)
