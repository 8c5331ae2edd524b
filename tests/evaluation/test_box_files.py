import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from box_sets import CATEGORY_IDS, CLASSES, draw_detections, draw_objects, read_truth
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.box_files import (
    ALL_CLASSES,
    encode_ap,
    encode_curves,
    encode_detections,
    encode_errors,
    encode_images,
    list_files,
    read_ap,
    read_curves,
    read_errors,
    read_images,
)
from resnest_imagenet.evaluation.boxes import FIGURES, score_detections
from resnest_imagenet.evaluation.detection_errors import Outcome, find_errors
from resnest_imagenet.evaluation.detections import read_results


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return read_truth(tmp_path_factory.mktemp("truth") / "instances.json", draw_objects(1), masks=True)


@pytest.fixture(scope="module")
def scores(truth):
    return score_detections(draw_detections(1, truth, masks=True), truth, masks=True)


def write(folder, content):
    path = folder / "file.csv"
    path.write_bytes(content)
    return path


def find_all(scores, truth):
    return [find_errors(scores.detections, truth, kind) for kind in ("box", "mask")]


def test_average_precision_of_classes(truth, scores, tmp_path):
    path = write(tmp_path, encode_ap(scores, truth))
    rows = read_ap(path)
    assert [(row.kind, row.name) for row in rows] == [(kind, name) for kind in ("box", "mask") for name in CLASSES]
    for row, (kind, label) in zip(rows, [(kind, n) for kind in scores.kinds for n in range(4)], strict=True):
        assert row.values["category_id"] == CATEGORY_IDS[label]
        assert row.values["objects"] == ((truth.labels == label) & ~truth.crowds).sum()
        assert row.values["detections"] == (scores.detections.labels == label).sum()
        for name in FIGURES:
            expected = kind.per_class(name)[label]
            value = row.values[name]
            assert (value is None and np.isnan(expected)) or value == pytest.approx(expected, rel=1e-5)
    assert rows[3].values["ap"] is None and rows[0].values["ap"] > 0
    with open(path, newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)]


def test_curves(truth, scores, tmp_path):
    curves = read_curves(write(tmp_path, encode_curves(scores, truth)))
    assert {key[:2] for key in curves} == {(kind, iou) for kind in ("box", "mask") for iou in ("mean", "0.50", "0.75")}
    assert {key[2] for key in curves} == set(CLASSES[:3])
    for (kind, iou, name), curve in curves.items():
        result = scores.boxes if kind == "box" else scores.masks
        expected = result.precision_at(None if iou == "mean" else float(iou))[CLASSES.index(name)]
        np.testing.assert_allclose(curve, expected, rtol=1e-5)


def test_errors(truth, scores, tmp_path):
    rows = read_errors(write(tmp_path, encode_errors(scores.detections, truth, find_all(scores, truth))))
    assert [row.name for row in rows] == [*CLASSES, ALL_CLASSES] * 2
    for kind in ("box", "mask"):
        errors = find_errors(scores.detections, truth, kind)
        counts = errors.count(scores.detections, truth)
        *of_classes, of_all = (row for row in rows if row.kind == kind)
        for label, row in enumerate(of_classes):
            assert row.values == {name: count[label] for name, count in counts.items()}
        assert of_all.values.pop("correct") == pytest.approx(errors.ap50, rel=1e-5)
        assert of_all.values == pytest.approx(errors.gains, rel=1e-5)


def test_detections(truth, scores, tmp_path):
    table = scores.detections
    path = write(tmp_path, encode_detections(table, truth))
    read = read_results(path, truth)
    for name in ("images", "boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(table, name))
    assert read.masks == table.masks
    assert list(json.loads(path.read_bytes())[0]) == ["image_id", "category_id", "score", "bbox", "segmentation"]
    boxes_only = score_detections(draw_detections(1, truth), truth, masks=False)
    path.write_bytes(encode_detections(boxes_only.detections, truth))
    assert read_results(path, truth).masks is None
    rows = read_ap(write(tmp_path, encode_ap(boxes_only, truth)))
    assert {row.kind for row in rows} == {"box"}


def name_images(count):
    names = np.array([b"a,\nb.jpg", *(b"%d.jpg" % number for number in range(1, count))])
    return ImageFolder(Path("/photos"), CLASSES, names, np.zeros(count, np.int64))


def test_images(truth, scores, tmp_path):
    table, errors = scores.detections, find_all(scores, truth)[0]
    images = name_images(len(truth.image_ids))
    rows = read_images(write(tmp_path, encode_images(errors, table, truth, images)))
    assert [row.file for row in rows] == [images.name(index) for index in range(len(images))]
    assert rows[0].file == "/photos/a,\nb.jpg"
    for index, row in enumerate(rows):
        certain = errors.outcomes[(table.images == index) & (table.scores >= 0.5)]
        assert row.objects == ((truth.images == index) & ~truth.crowds).sum()
        assert (row.correct, row.wrong) == ((certain == Outcome.CORRECT).sum(), (certain > Outcome.IGNORED).sum())
        assert row.num_faults == row.objects - row.correct + row.wrong
    assert sum(row.correct for row in rows) > 0 and sum(row.wrong for row in rows) > 0


def test_all_files(truth, scores):
    table, errors = scores.detections, find_all(scores, truth)
    images = name_images(len(truth.image_ids))
    contents = {name: encode() for name, encode in list_files(scores, truth, images).items()}
    assert contents == {
        "ap.csv": encode_ap(scores, truth),
        "precision_recall.csv": encode_curves(scores, truth),
        "errors.csv": encode_errors(table, truth, errors),
        "images.csv": encode_images(errors[0], table, truth, images),
        "detections.json": encode_detections(table, truth),
    }


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"x" * 200_000, None])
@pytest.mark.parametrize("read", [read_ap, read_curves, read_errors, read_images])
def test_other_files_are_named(read, content, tmp_path):
    path = tmp_path / "file.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"file.csv: not of an evaluation of a detector \("):
        read(path)


@pytest.mark.parametrize("change", [(b'"box"', b'"box",1'), (b",7,", b",x,")])
def test_damaged_rows_are_named(change, truth, scores, tmp_path):
    path = write(tmp_path, encode_ap(scores, truth).replace(*change))
    with pytest.raises(DataError, match=r"file.csv: not of an evaluation of a detector \("):
        read_ap(path)
