"""Self-contained pages for a browser: no script, no network; light or dark as the reader's browser prefers."""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

SIDE = 224  # of a picture, in pixels
LONG = 30  # rows from which a table of classes scrolls
FIGURE_SPACE = "\u2007"  # as wide as a digit


def render(template: str, **values: object) -> Markup:
    """Return a template of this folder with its values, as HTML: texts are escaped, `Markup` is HTML already."""
    return Markup(_open_templates().get_template(template).render(values))


@cache
def _open_templates() -> Environment:
    return Environment(
        loader=PackageLoader("resnest_imagenet.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(title: str, head: Markup, sections: Mapping[str, Markup] | None = None) -> str:
    """Return a whole page: what comes first, a list of the sections, and the sections.

    Args:
        title: of the page.
        head: below the title.
        sections: by their titles; empty ones are not shown.
    """
    shown = [{"title": name, "body": body} for name, body in (sections or {}).items() if body]
    return str(render("page.html", title=title, head=head, sections=shown))


def render_table(
    head: Iterable[object], rows: Iterable[Iterable[object]], style: str = "", is_long: bool = False
) -> Markup:
    """Return a table of texts, numbers and HTML; on a narrow screen each row becomes lines of a title and a value.

    Args:
        head: titles of the columns.
        rows: each has a value for each column.
        style: "text" aligns all columns to the left, "ends-in-text" the first and the last one.
        is_long: whether the table scrolls in a frame of its own.
    """
    titles = list(map(str, head))
    frame = "wide tall" if is_long else "wide"
    return render("table.html", head=titles, rows=rows, style=style, frame=frame, titles=map(_quote_in_css, titles))


def _quote_in_css(text: str) -> str:
    """Return a string of CSS."""
    return '"' + re.sub(r"[^\w %.,-]", lambda match: f"\\{ord(match[0]):x} ", text, flags=re.ASCII) + '"'


def render_bar(share: float, text: str) -> Markup:
    """Return a bar before a number.

    Args:
        share: 0 to 1.
        text: the number.
    """
    return Markup('<meter value="{:.4f}"></meter> {}').format(share, text)


def arrange(parts: Iterable[Markup], size: str = "") -> Markup:
    """Return figures and tables side by side.

    Args:
        parts: HTML.
        size: of each: "", "large" or "whole".
    """
    return Markup('<div class="charts {}">{}</div>').format(size, Markup().join(parts))


def render_lines(lines: Iterable[str | Markup], style: str = "") -> Markup:
    """Return texts, each on a line of its own."""
    return Markup().join(Markup("<div{}>{}</div>").format(_style(style), line) for line in lines)


def _style(name: str) -> Markup:
    return Markup(" class={}").format(name) if name else Markup()


def render_picture(encoded: bytes, truth: str, caption: Iterable[Markup]) -> Markup:
    """Return an image, cut to a square, above some lines.

    Args:
        encoded: a file that `decode` reads.
        truth: its class, for readers who cannot see the image.
        caption: HTML, one item for each line.
    """
    from resnest_imagenet.data.torchvision import decode  # late: torchvision takes seconds, and few pages need it

    picture = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy())
    return render_figure(embed_image(ImageOps.fit(picture, (SIDE, SIDE)), truth), caption)


def render_figure(content: Markup, caption: Iterable[str | Markup]) -> Markup:
    """Return a figure above its lines."""
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(content, Markup().join(caption))


def render_views(views: Sequence[tuple[str, Image.Image]], caption: Iterable[str | Markup]) -> Markup:
    """Return pictures side by side, each under its title, above some lines.

    Args:
        views: titles and RGB pictures.
        caption: HTML, one item for each line.
    """
    parts = Markup().join(
        Markup("<div><div>{}</div>{}</div>").format(title, embed_image(picture, title)) for title, picture in views
    )
    html = '<figure class="strip"><div class="views">{}</div><figcaption>{}</figcaption></figure>'
    return Markup(html).format(parts, Markup().join(caption))


def embed_image(picture: Image.Image, text: str) -> Markup:
    """Return an <img> that includes the data of its picture.

    Args:
        picture: RGB.
        text: describes it for readers who cannot see it.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/jpeg;base64,{}">').format(text, data)
