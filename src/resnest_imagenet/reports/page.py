"""Self-contained pages for a browser: no script, no network; light or dark as the reader's browser prefers."""

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image, ImageOps

from resnest_imagenet.data.torchvision import decode

SIDE = 224  # of a picture, in pixels

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d8d8d8; --muted: #5f5f5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #16181c; --line: #3a3d44; --muted: #a5a8ae; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 76rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, .text td, .text th, .ends-in-text :is(th, td):last-child { text-align: left; }
meter { width: 6rem; height: .8rem; vertical-align: middle; }
.charts { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.charts.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img, figure svg { width: 100%; height: auto; display: block; }
summary { cursor: pointer; }
figure img { border: 1px solid var(--line); }
figcaption { font-size: .85rem; color: var(--muted); overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .85rem; }
.right { color: var(--ink); font-weight: 600; }
.tall { max-height: 40rem; overflow-y: auto; }
.views { display: grid; gap: .25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.strip { margin-bottom: 1.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -.1em;
  border: 1px solid var(--line); }
"""


def render_page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: text.
        body: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{body}
</body></html>
"""


def render_table(head: Iterable[str], rows: Iterable[Iterable[object]], style: str = "") -> str:
    """Return a table of texts and numbers; it scrolls sideways if it is too wide.

    Args:
        head: titles of the columns.
        rows: each has a value for each column.
        style: "text" aligns all columns to the left, "ends-in-text" the first and the last one.
    """
    heads = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{style}"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def render_picture(encoded: bytes, truth: str, caption: Iterable[str]) -> str:
    """Return an image, cut to a square, above some lines.

    Args:
        encoded: a file that `decode` reads.
        truth: its class, for readers who cannot see the image.
        caption: HTML, one item for each line.
    """
    picture = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy())
    image = embed_image(ImageOps.fit(picture, (SIDE, SIDE)), truth)
    return f"<figure>{image}<figcaption>{''.join(caption)}</figcaption></figure>"


def embed_image(picture: Image.Image, text: str) -> str:
    """Return an <img> that includes the data of its picture.

    Args:
        picture: RGB.
        text: describes it for readers who cannot see it.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(text)}" src="data:image/jpeg;base64,{data}">'
