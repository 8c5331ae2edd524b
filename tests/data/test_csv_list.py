"""A list of images in a CSV file: what it may look like, and a line about everything else."""

import os
from pathlib import Path

import pytest

from resnest_imagenet.data.csv_list import read_csv
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.errors import DataError

IMAGES = ("a.jpg", "b.jpg", "c, d.jpg", "deep/e.jpg", "f.png", "g.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)  # the listing opens nothing
    return tmp_path


def write(root: Path, content: str | bytes) -> None:
    (root / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())


def list_parts(root: Path, **options) -> list[list[tuple[str, str]]]:
    """Return (path, class) of each image of both parts."""
    parts = ClassifiedData("csv", str(root), **options).open_parts()
    return [
        [
            (os.fsdecode(file), part.classes[label])
            for file, label in zip(part.files.tolist(), part.labels.tolist(), strict=True)
        ]
        for part in parts
    ]


PARTS = [
    [("a.jpg", "cat"), ("b.jpg", "dog, wet")],
    [("c, d.jpg", "cat"), ("deep/e.jpg", "dog, wet")],
]
TABLE = (
    ("path", "label", "part"),
    ("a.jpg", "cat", "train"),
    ("deep/e.jpg", '"dog, wet"', "val"),
    ('"c, d.jpg"', "cat", "val"),
    ("./b.jpg", '"dog, wet"', "train"),
    ("g.jpg", "cat", "test"),
)


def test_a_list_is_read_in_every_form_in_which_programs_write_it(root):
    lines = [",".join(cells) for cells in TABLE]
    swapped = [f"{label},1,{part},{path}" for path, label, part in (("path", "label", "part"), *TABLE[1:])]
    forms = {
        "as it is": "\n".join(lines) + "\n",
        "Windows": ("\ufeff" + "\r\n".join(lines) + "\r\n").encode(),
        "without an end, blank lines": "\n\n".join(lines),
        "spaces": "\n".join(", ".join(cells) for cells in TABLE),
        "capitals": "Path,Label,Part\n" + "\n".join(lines[1:]),
        "semicolons": "\n".join(";".join(cells) for cells in TABLE),
        "tabs": "\n".join("\t".join(cells) for cells in TABLE),
        "other order and columns": "\n".join(swapped).replace("label,1", "label,score"),
        "rows in another order, and one twice": "\n".join([lines[0], *lines[:0:-1], lines[1]]),
    }
    for form, content in forms.items():
        write(root, content)
        assert list_parts(root) == PARTS, form
    assert ClassifiedData("csv", str(root)).open_part("train").notes == (
        f"{root}/labels.csv: 1 rows repeat another (the first: line 7)",
    )
    assert [len(ClassifiedData("csv", str(root), val_dir=part).open_part("val")) for part in ("val", "test")] == [2, 1]


def test_the_file_may_stand_elsewhere_and_have_absolute_paths(root, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("lists")
    (elsewhere / "mine.csv").write_text(f"path,label\na.jpg,cat\n{root}/b.jpg,cat\n")
    monkeypatch.chdir(elsewhere)
    for name in (str(elsewhere / "mine.csv"), "mine.csv"):
        images = read_csv(str(root), name).open("val", "data.val_dir")  # without parts, all
        assert [images.name(index) for index in range(2)] == [f"{root}/b.jpg", f"{root}/a.jpg"]
        assert images.read(1) == b"a.jpg"


HEAD = "path,label\n"
PARTS_DIFFER = "part val of ROOT/labels.csv lacks 1 of the classes of part train of ROOT/labels.csv: cat"
FAULTS = (
    (None, "labels.csv: no such file (in ROOT: no .csv); set data.csv"),
    ("", "labels.csv: its first line must be path,label or path,label,part, not "),
    ("a.jpg,cat\n", "labels.csv: its first line must be path,label or path,label,part, not a.jpg,cat"),
    ("image,breed\na.jpg,cat\n", "labels.csv: its first line must be path,label or path,label,part, not image,breed"),
    (HEAD, "labels.csv: no rows: write a path and a label in each"),
    (HEAD + "a.jpg,\n", "labels.csv, line 2: no label"),
    (HEAD + "a.jpg,  \n", "labels.csv, line 2: no label"),
    (HEAD + ",cat\n", "labels.csv, line 2: no path"),
    (HEAD + "c, d.jpg,cat\n", "labels.csv, line 2: 3 fields, but 2 in the first line: put a name with a comma in"),
    (HEAD + '"a.jpg,cat\nb.jpg,cat\n', "labels.csv, line 3: unexpected end of data: is a quotation mark not closed?"),
    (HEAD + "a.jpg,cat\nb.jpg,cat\n./a.jpg,dog\n", "line 4: a.jpg has the label dog, but cat in line 2: remove one of"),
    (
        "path,label,part\na.jpg,cat,train\na.jpg,cat,val\n",
        "line 3: a.jpg has the part val, but train in line 2: remove",
    ),
    (HEAD.encode("utf-16"), "labels.csv: not text in UTF-8 (in UTF-16?): save it as CSV in UTF-8"),
    (HEAD + "a.jpg,cat\nb.jpg,cat\n", "labels.csv has no parts: data.val_split=0.2 keeps a fifth of each class for"),
    ("path,label,part\na.jpg,cat,train\nb.jpg,cat,\n", "labels.csv, line 3: no part: data.val_split=0.2 keeps"),
    (
        "path,label,part\na.jpg,cat,train\nb.jpg,cat,valid\n",
        "no rows of part val (parts: train, valid); set data.val_dir",
    ),
    (
        "path,label,part\na.jpg,cat,train\nz.jpg,cat,val\ny.jpg,cat,val\n",
        "labels.csv, line 3: ROOT/z.jpg: no such file, and 1 other rows are without a file; paths are relative to",
    ),
    ("path,label,part\na.jpg,cat,train\nf,cat,val\n", "line 3: ROOT/f: no such file: its name is f.png; paths are"),
    ("path,label,part\na.jpg,cat,train\nb.jpg,dog,val\n", PARTS_DIFFER),
)


def test_faults_are_one_line(root):
    for content, message in FAULTS:
        if content is not None:
            write(root, content)
        with pytest.raises(DataError) as caught:
            list_parts(root)
        line = str(caught.value)
        assert message.replace("ROOT", str(root)) in line and "\n" not in line, content
    write(root, "path,label,part\na.jpg,cat,train\nb.jpg,cat,val\n")
    with pytest.raises(
        DataError, match=r"data.train_dir and data.val_dir are both val: name two parts of .*labels.csv"
    ):
        list_parts(root, train_dir="val")
    with pytest.raises(DataError, match="every row has a part already: remove data.val_split"):
        list_parts(root, val_split=0.5)
    with pytest.raises(DataError, match=r"labels.csv is a file: set data.root=.* data.csv=labels.csv"):
        read_csv(str(root / "labels.csv"), None)


def test_rows_without_a_part_are_split_and_the_others_stay(tmp_path):
    """With every path in a list, it is the split of the folder."""
    names = [f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(10)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write(tmp_path, "path,label\n" + "".join(f"{name},{name[:3]}\n" for name in reversed(names)))
    of_list = list_parts(tmp_path, val_split=0.3)
    parts = ClassifiedData("folder", str(tmp_path), val_split=0.3).open_parts()
    assert [sorted(path for path, _ in part) for part in of_list] == [
        sorted(map(os.fsdecode, part.files.tolist())) for part in parts
    ]
    rows = "".join(f"{name},{name[:3]},{'test' if '9' in name else 'val' if '8' in name else ''}\n" for name in names)
    write(tmp_path, "path,label,part\n" + rows)
    train, val = list_parts(tmp_path, val_split=0.25)
    assert len(train) == 12 and len(val) == 4 + 2 and {"cat/8.jpg", "dog/8.jpg"} < {path for path, _ in val}
    assert len(read_image_folder(str(tmp_path), ".", "x")) == 20
