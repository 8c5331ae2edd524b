"""A comparison as a page for a browser, which needs nothing else: no script, no network."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from resnest_imagenet.data.torchvision import decode
from resnest_imagenet.evaluation.compare import Comparison, describe_pairs

PICTURES = 60  # at most
SIDE = 224  # of a picture, in pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d8d8d8; --muted: #5f5f5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #16181c; --line: #3a3d44; --muted: #a5a8ae; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 72rem; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
meter { width: 6rem; height: .8rem; vertical-align: middle; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; border: 1px solid var(--line); }
figcaption { font-size: .85rem; color: var(--muted); overflow-wrap: anywhere; }
.right { color: var(--ink); font-weight: 600; }
"""


def render_page(comparison: Comparison, protocol: str) -> str:
    """Return the HTML: the table by class, the pairs, and the images on which the networks disagree."""
    names, images = comparison.names, comparison.images
    head = "".join(f"<th>{escape(name)}: true p</th><th>error</th>" for name in names)
    rows = [
        _row(name, comparison.probabilities[:, images.labels == label]) for label, name in enumerate(comparison.titles)
    ]
    totals = comparison.probabilities.sum(1)
    cells = "".join(f"<td>{total:,.2f}</td><td>{len(images) - total:,.2f}</td>" for total in totals)
    rows += [f"<tr><td>total</td><td>{len(images):,}</td>{cells}</tr>", _row("average", comparison.probabilities)]
    for title, values in (("top-1 %", comparison.is_right), ("top-5 %", comparison.in_top5)):
        cells = "".join(f'<td colspan="2">{100 * share:.2f}</td>' for share in values.mean(1))
        rows.append(f"<tr><td>{title}</td><td></td>{cells}</tr>")
    pairs = "".join(f"<p>{escape(line)}</p>" for line in describe_pairs(comparison))
    disagreements = comparison.disagreements
    pictures = "".join(_picture(comparison, index) for index in disagreements[:PICTURES].tolist())
    shown = f"{min(PICTURES, len(disagreements))} of {len(disagreements)}, the largest differences first"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(" against ".join(names))}</title><style>{STYLE}</style></head><body>
<h1>{escape(" against ".join(names))}</h1>
<p>{len(images):,} images of {escape(str(images.root))}; {escape(protocol)}. "True p" is the mean probability that a
network gives to the true class; error is 1 minus that.</p>
<div class="wide"><table>
<thead><tr><th>class</th><th>images</th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>
{pairs}
<h2>Where they disagree</h2>
<p>{shown if pictures else "Nowhere: every image is right or wrong for all of them."}</p>
<div class="pictures">{pictures}</div>
</body></html>
"""


def _row(name: str, probabilities: np.ndarray) -> str:
    means = probabilities.mean(1)
    cells = "".join(f'<td><meter value="{p:.4f}"></meter> {p:.4f}</td><td>{1 - p:.4f}</td>' for p in means)
    return f"<tr><td>{escape(name)}</td><td>{probabilities.shape[1]:,}</td>{cells}</tr>"


def _picture(comparison: Comparison, index: int) -> str:
    images = comparison.images
    picture = Image.fromarray(decode(images.read(index)).permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    ImageOps.fit(picture, (SIDE, SIDE)).save(buffer, "JPEG", quality=80)
    truth = escape(comparison.titles[images.labels[index]])
    lines = [
        f"<div{' class=right' if right else ''}>{escape(name)}: {escape(predicted)}, true p {p:.3f}</div>"
        for name, predicted, p, right in zip(
            comparison.names,
            comparison.predicted[:, index],
            comparison.probabilities[:, index],
            comparison.is_right[:, index],
            strict=True,
        )
    ]
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{truth}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption><div>{truth}: {escape(Path(images.name(index)).name)}</div>{''.join(lines)}</figcaption></figure>"
    )
