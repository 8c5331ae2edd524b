import csv
import re
from pathlib import Path

import numpy as np
import pytest

from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.region_files import encode_iou, encode_scenes, read_regions
from resnest_imagenet.evaluation.regions import Regions

CLASSES = ("sky", '=HYPERLINK("x")', 'tree; plant, "flora"')
PROTOCOLS = ("whole, own size", "published, long side 520 times 0.5 1, windows of 480")
IMAGES = ImageFolder(Path("/set"), ("",), np.array([b"a.jpg", b'b "odd",\r\n\xff.jpg']), np.zeros(2, np.int64))


def make_regions(seed):
    matrix = np.random.default_rng(seed).integers(0, 10**12, (3, 3))
    matrix[1] = 0  # absent
    return Regions(matrix, np.array([7, 0]), np.array([10**10, 0]))


EVALUATIONS = [(protocol, make_regions(seed)) for seed, protocol in enumerate(PROTOCOLS)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "iou.csv").write_bytes(encode_iou(EVALUATIONS, CLASSES))
    (tmp_path / "scenes.csv").write_bytes(encode_scenes(IMAGES, EVALUATIONS))
    return tmp_path / "iou.csv", tmp_path / "scenes.csv"


def test_written_and_read_back(files):
    for (protocol, regions), read in zip(EVALUATIONS, read_regions(*files), strict=True):
        assert (read.protocol, read.classes) == (protocol, CLASSES)
        assert read.files == tuple(IMAGES.name(index) for index in range(2))
        for name in ("matrix", "correct", "labelled"):
            np.testing.assert_array_equal(getattr(read.regions, name), getattr(regions, name))
        assert read.regions.miou == regions.miou


def test_what_stands_in_the_files(files):
    with open(files[0], newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["protocol", "class", "iou", "labelled", "predicted"] and header[5] == "sky"
    matrix = EVALUATIONS[0][1].matrix
    iou = 100 * matrix[0, 0] / (matrix[0].sum() + matrix[:, 0].sum() - matrix[0, 0])
    assert rows[0][:2] == [PROTOCOLS[0], "sky"] and float(rows[0][2]) == pytest.approx(iou, rel=1e-5)
    assert [int(cell) for cell in rows[0][3:]] == [matrix[0].sum(), matrix[:, 0].sum(), *matrix[0]]
    assert rows[1][2:4] == ["0.0", "0"] and len(rows) == 6
    cells = [cell for row in (header, *rows) for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)]
    with open(files[1], newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert next(csv.reader(file)) == ["protocol", "file", "correct", "labelled"]


NO_NUMBER = "protocol,class,iou,labelled,predicted,sky\np,sky,1,1,1,x\n"


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", NO_NUMBER, "x" * 200_000, None])
def test_other_files_are_named(files, content):
    files[0].unlink()
    if content is not None:
        files[0].write_text(content)
    with pytest.raises(DataError, match=r"iou.csv: not the regions of an evaluation \("):
        read_regions(*files)


def test_files_that_do_not_belong_together(files):
    files[1].write_bytes(encode_scenes(IMAGES, EVALUATIONS[:1]))
    with pytest.raises(DataError, match="iou.csv and .*scenes.csv are not of the same evaluations"):
        read_regions(*files)


def test_a_class_is_missing(files):
    files[0].write_text("".join(files[0].read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="iou.csv: 2 rows of classes, but 3 columns"):
        read_regions(*files)
