"""A comparison as a page for a browser."""

from html import escape
from pathlib import Path

import numpy as np

from resnest_imagenet.inference.compare import Comparison, describe_pairs, describe_protocols
from resnest_imagenet.reports.page import render_page, render_picture

PICTURES = 60  # at most


def render_comparison(comparison: Comparison) -> str:
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
    protocols = "; ".join(describe_protocols(comparison))
    body = f"""<p>{len(images):,} images of {escape(str(images.root))}; {escape(protocols)}. "True p" is the mean
probability that a network gives to the true class; error is 1 minus that.</p>
<div class="wide"><table>
<thead><tr><th>class</th><th>images</th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>
{pairs}
<h2>Where they disagree</h2>
<p>{shown if pictures else "Nowhere: all networks are right, or all are wrong, on every image."}</p>
<div class="pictures">{pictures}</div>"""
    return render_page(" against ".join(names), body)


def _row(name: str, probabilities: np.ndarray) -> str:
    means = probabilities.mean(1) if probabilities.size else np.zeros(len(probabilities))
    cells = "".join(f'<td><meter value="{p:.4f}"></meter> {p:.4f}</td><td>{1 - p:.4f}</td>' for p in means)
    return f"<tr><td>{escape(name)}</td><td>{probabilities.shape[1]:,}</td>{cells}</tr>"


def _picture(comparison: Comparison, index: int) -> str:
    images = comparison.images
    truth = comparison.titles[images.labels[index]]
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
    title = f"<div>{escape(truth)}: {escape(Path(images.name(index)).name)}</div>"
    return render_picture(images.read(index), truth, [title, *lines])
