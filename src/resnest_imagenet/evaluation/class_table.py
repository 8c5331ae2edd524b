"""Precision, recall and F1 of each class, for results files and for people."""

from collections.abc import Mapping, Sequence

from resnest_imagenet.errors import list_names, printable
from resnest_imagenet.evaluation.mistakes import ClassFigures
from resnest_imagenet.evaluation.results import ClassResult
from resnest_imagenet.models.imagenet_classes import short_class_names

LONGEST = 20  # rows of a table for people; of more classes it has the LOWEST
LOWEST = 10


def list_classes(figures: ClassFigures, classes: Sequence[str]) -> dict[str, ClassResult]:
    """Return the figures of K classes by their names, in the form of results files.

    Args:
        figures: of the classes.
        classes: their K names.
    """
    columns = (figures.precision, figures.recall, figures.f1, figures.images, figures.predicted)
    rows = zip(classes, figures.is_absent.tolist(), *(column.tolist() for column in columns), strict=True)
    return {
        printable(name): ClassResult(
            precision=None if is_absent else precision,
            recall=None if is_absent else recall,
            f1=None if is_absent else f1,
            images=images,
            predicted=predicted,
        )
        for name, is_absent, precision, recall, f1, images, predicted in rows
    }


def format_classes(classes: Mapping[str, ClassResult]) -> str:
    """Return a table for people: each class with images, or those with the lowest F1, then the means.

    Lines below it name the classes that were never predicted, and those without images.
    """
    titles = dict(zip(classes, short_class_names(list(classes)), strict=True))
    # F1 is None for a class without images, and only for such a class.
    rows = [(titles[name], figures) for name, figures in classes.items() if figures.f1 is not None]
    if not rows:
        return "no class has images"
    head = "class"
    shown = rows
    if len(rows) > LONGEST:
        shown = sorted(rows, key=lambda row: row[1].f1 or 0)[:LOWEST]
        head = f"the {LOWEST} lowest F1"
    mean = f"mean of {len(rows):,}"
    wide = max(len(text) for text in (head, mean, *(title for title, _ in shown)))
    lines = [f"{head:<{wide}} {'images':>7} {'precision %':>11} {'recall %':>8} {'F1 %':>6}"]
    lines += [
        _format_row(title, wide, figures.images, (figures.precision, figures.recall, figures.f1))
        for title, figures in shown
    ]
    means = [sum(values) / len(rows) for values in zip(*((f.precision, f.recall, f.f1) for _, f in rows), strict=True)]
    lines.append(_format_row(mean, wide, sum(figures.images for _, figures in rows), means))
    never = [title for title, figures in rows if figures.predicted == 0]
    absent = [titles[name] for name, figures in classes.items() if figures.f1 is None]
    lines += [f"never predicted, so precision is 0: {list_names(never)}"] if never else []
    lines += [f"without images, so not in the means: {list_names(absent)}"] if absent else []
    return "\n".join(lines)


def _format_row(title: str, wide: int, images: int, shares: Sequence[float | None]) -> str:
    precision, recall, f1 = (share or 0.0 for share in shares)
    return f"{title:<{wide}} {images:>7,} {precision:>11.2f} {recall:>8.2f} {f1:>6.2f}"
