"""A list of classified images: a CSV file with the columns path, label and, if it likes, part."""

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.folder import IMAGE_SUFFIXES, ImageFolder
from resnest_imagenet.data.reading import read_file
from resnest_imagenet.data.source import order_classes, require_root
from resnest_imagenet.data.validation import choose_val
from resnest_imagenet.errors import DataError, list_names

NAME = "labels.csv"  # in the data set's folder, where data.csv does not name another
_DELIMITERS = ",;\t"  # the first that the first line has: spreadsheets of many countries write semicolons


class Row(NamedTuple):
    """A row of the file.

    Attributes:
        line: its number in the file, from 1.
        path: of the image, below the data set's folder or absolute.
        label: name of the class.
        part: of the data set; "" if the file does not tell.
    """

    line: int
    path: str
    label: str
    part: str


@dataclass(frozen=True)
class CsvList:
    """The rows of a file, each image once.

    Attributes:
        path: of the file.
        root: folder of the images.
        rows: in the file's order.
        notes: lines about rows that are skipped.
    """

    path: Path
    root: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def split(self, train: str, val: str, share: float, seed: int) -> "CsvList":
        """Choose the part of each image that has none, see `choose_val`.

        Args:
            train: name of the part of training.
            val: name of the part of validation.
            share: of the images of each class that are for validation.
            seed: of the choice.

        Raises:
            DataError: every row has a part, or a class has one image without a part.
        """
        free = [row for row in self.rows if not row.part]
        if not free:
            raise DataError(f"{self.path}: every row has a part already: remove data.val_split")
        classes = order_classes({row.label for row in free})
        files, labels = _make_arrays(free, classes)
        is_val = choose_val(files, labels, classes, share, seed, self.path)
        chosen = {row.path: val if chosen else train for row, chosen in zip(free, is_val.tolist(), strict=True)}
        rows = tuple(row._replace(part=row.part or chosen[row.path]) for row in self.rows)
        return CsvList(self.path, self.root, rows, self.notes)

    def require_parts(self) -> None:
        """Raise a DataError if a row has no part."""
        free = next((row for row in self.rows if not row.part), None)
        if free is not None:
            has_parts = any(row.part for row in self.rows)
            where = f"{self.path}, line {free.line}: no part" if has_parts else f"{self.path} has no parts"
            raise DataError(f"{where}: data.val_split=0.2 keeps a fifth of each class for validation")

    def take(self, part: str, option: str) -> tuple[Row, ...]:
        """Return the rows of one part; all rows if none has a part.

        Args:
            part: its name.
            option: the option that names it, for the error.

        Raises:
            DataError: there are none.
        """
        counts = Counter(row.part for row in self.rows)
        rows = tuple(row for row in self.rows if row.part == part or counts.keys() == {""})
        if not rows:
            raise DataError(f"{self.path}: no rows of part {part} (parts: {list_names(sorted(counts))}); set {option}")
        return rows

    def open(self, part: str, option: str) -> ImageFolder:
        """List the images of one part, see `take`, sorted by class and path: the order of the rows has no effect.

        Raises:
            DataError: there are none, or a file is missing.
        """
        rows = self.take(part, option)
        missing = [row for row in rows if not os.path.exists(os.path.join(self.root, row.path))]
        if missing:
            raise DataError(self._describe_missing(missing))
        classes = order_classes({row.label for row in rows})
        rank = {label: number for number, label in enumerate(classes)}
        files, labels = _make_arrays(sorted(rows, key=lambda row: (rank[row.label], os.fsencode(row.path))), classes)
        return ImageFolder(self.root, tuple(classes), files, labels, notes=self.notes)

    def _describe_missing(self, missing: list[Row]) -> str:
        row = missing[0]
        path = os.path.join(self.root, row.path)
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if os.path.exists(path + suffix)), None)
        hint = f": its name is {os.path.basename(path)}{suffix}" if suffix else ""
        others = f", and {len(missing) - 1:,} other rows are without a file" if len(missing) > 1 else ""
        return f"{self.path}, line {row.line}: {path}: no such file{hint}{others}; paths are relative to data.root"


def find_csv(root: str, name: str | None) -> Path:
    """Return the file, in the data set's folder or elsewhere.

    Raises:
        DataError: it is not there.
    """
    if os.path.isfile(root):
        folder, file = os.path.split(root)
        raise DataError(f"data.root={root} is a file: set data.root={folder or '.'} data.csv={file}")
    require_root(root)
    path = Path(root, name or NAME)
    if name is not None and not path.is_file() and os.path.isfile(name):
        path = Path(name)
    if not path.is_file():
        there = list_names(sorted(entry.name for entry in Path(root).glob("*.csv")), 5) or "no .csv"
        raise DataError(f"{path}: no such file (in {root}: {there}); set data.csv")
    return path


def read_csv(root: str, name: str | None) -> CsvList:
    """Read a file of `find_csv`: in UTF-8, with line ends and byte order mark of any system, other columns skipped.

    Raises:
        DataError: it is not there, not such a file, or two rows of an image differ.
    """
    path = find_csv(root, name)
    rows, twice = _drop_repeated(path, _read_rows(path))
    if not rows:
        raise DataError(f"{path}: no rows: write a path and a label in each")
    notes = (f"{path}: {len(twice):,} rows repeat another (the first: line {twice[0].line})",) if twice else ()
    return CsvList(path, Path(root), tuple(rows), notes)


def _read_rows(path: Path) -> list[Row]:
    try:
        content = read_file(path).removeprefix(b"\xef\xbb\xbf")
    except (OSError, BadImage) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if b"\0" in content:
        raise DataError(f"{path}: not text in UTF-8 (in UTF-16?): save it as CSV in UTF-8")
    text = os.fsdecode(content)
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in _DELIMITERS if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        if not {"path", "label"} <= set(header):
            raise DataError(f"{path}: its first line must be path,label or path,label,part, not {first.strip()[:60]}")
        rows = [_read_row(path, reader.line_num, header, cells) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}: is a quotation mark not closed?") from error
    return rows


def _read_row(path: Path, line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(cells)} fields, but {len(header)} in the first line: put a name with a comma "
            "in quotation marks"
        )
    values = dict(zip(header, cells, strict=True))
    row = Row(line, values["path"], values["label"].strip(), values.get("part", "").strip())
    for column in ("path", "label"):
        if not getattr(row, column):
            raise DataError(f"{path}, line {line}: no {column}")
    return row._replace(path=os.path.normpath(row.path))


def _drop_repeated(path: Path, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return the first row of each image, and the rows that repeat it.

    Raises:
        DataError: another row has another label or part.
    """
    firsts: dict[str, Row] = {}
    twice = []
    for row in rows:
        first = firsts.setdefault(row.path, row)
        if first is row:
            continue
        for column in ("label", "part"):
            value, before = getattr(row, column), getattr(first, column)
            if value != before:
                raise DataError(
                    f"{path}, line {row.line}: {row.path} has the {column} {value or '(none)'}, but "
                    f"{before or '(none)'} in line {first.line}: remove one of the rows"
                )
        twice.append(row)
    return list(firsts.values()), twice


def _make_arrays(rows: list[Row], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of images, bytes (N,), and their labels, int64 (N,)."""
    rank = {label: number for number, label in enumerate(classes)}
    files = np.array([os.fsencode(row.path) for row in rows])
    return files, np.array([rank[row.label] for row in rows], dtype=np.int64)
