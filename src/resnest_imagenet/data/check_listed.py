"""Checks a set whose images of validation are named by a list, or chosen of class folders."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from resnest_imagenet.data.check import Part, Report, compare_classes, examine_parts, list_part
from resnest_imagenet.data.csv_list import Row, read_csv
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.data.source import order_classes
from resnest_imagenet.data.validation import choose_val, find_class_folders


def check_split(data: ClassifiedData, workers: int | None = None) -> Report:
    """Check class folders that `data.val_split` splits, as `check_images` does; copies of a file may be in both parts.

    Args:
        data: the set; its `val_split` is set.
        workers: number of processes; None means one for each core that this process may use.

    Raises:
        DataError: there is no such folder, there is one to evaluate on, or the processes keep dying.
    """
    assert data.val_split is not None
    folder = find_class_folders(data.root, data.train_dir, data.val_dir).absolute()
    above, name = str(folder.parent), folder.name
    whole = list_part(above, name, "data.root")
    classes = [path.removeprefix(f"{name}/").partition("/")[0] for path in whole.images]
    counts = Counter(classes)
    train, val = Part(data.train_dir, findings=whole.findings), Part(data.val_dir)
    for single in sorted(name for name, count in counts.items() if count == 1):
        val.add("missing class", f"{name}/{single}", "1 image: data.val_split needs two")
    images = [(path, owner) for path, owner in zip(whole.images, classes, strict=True) if counts[owner] > 1]
    names = order_classes({owner for _, owner in images})
    files = np.array([os.fsencode(path.removeprefix(f"{name}/")) for path, _ in images])
    labels = np.array([names.index(owner) for _, owner in images], dtype=np.int64)
    is_val = choose_val(files, labels, names, data.val_split, data.split_seed, folder)
    places = {path: (train, owner) for path, owner in zip(whole.images, classes, strict=True)}
    places |= {path: (val, owner) for (path, owner), chosen in zip(images, is_val.tolist(), strict=True) if chosen}
    return _examine(above, (train, val), places, workers, data.root)


def check_csv(data: ClassifiedData, train_dir: str | None, val_dir: str | None, workers: int | None = None) -> Report:
    """Check the images of a list.

    Args:
        data: the set.
        train_dir: the part to train on, or None.
        val_dir: the part to evaluate on, or None.
        workers: number of processes; None means one for each core that this process may use.

    Raises:
        DataError: the file is not such a list, has no row of a part, or the processes keep dying.
    """
    listed = read_csv(data.root, data.csv)
    if data.val_split is not None:
        listed = listed.split(data.train_dir, data.val_dir, data.val_split, data.split_seed)
    elif train_dir is not None and val_dir is not None:
        listed.require_parts()
    names = {"data.train_dir": train_dir, "data.val_dir": val_dir}
    parts: list[Part] = []
    places: dict[str, tuple[Part, str]] = {}
    for option, name in names.items():
        if name is not None:
            part = Part(name)
            places |= {
                row.path: (part, row.label) for row in _list_existing(part, listed.take(name, option), data.root)
            }
            parts.append(part)
    return _examine(data.root, tuple(parts), places, workers, data.root)


def _list_existing(part: Part, rows: tuple[Row, ...], root: str) -> list[Row]:
    """Return the rows that have a file; the others are findings of the part."""
    existing = []
    for row in rows:
        if os.path.exists(Path(root, row.path)):
            existing.append(row)
        else:
            part.add("missing image", row.path, f"line {row.line}")
    return existing


def _examine(
    folder: str, parts: tuple[Part, ...], places: dict[str, tuple[Part, str]], workers: int | None, root: str
) -> Report:
    """Decode the images, by paths below `folder`, of which `places` has the part and the class."""
    for path, (part, owner) in places.items():
        part.images.append(path)
        part.classes[owner] = part.classes.get(owner, 0) + 1
    findings = [finding for part in parts for finding in part.findings]
    if len(parts) == 2:
        findings += compare_classes(*parts)
    findings += examine_parts(folder, parts, workers, lambda path: (places[path][0].name, places[path][1]))
    return Report(root, parts, tuple(findings))
