import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.predictions import encode_predictions, read_predictions
from resnest_imagenet.evaluation.results import Measured
from resnest_imagenet.inference import compare, predict
from resnest_imagenet.inference.compare import Comparison
from resnest_imagenet.reports.table3 import format_table


def test_written_and_read_back(demo_images, tmp_path):
    shutil.copytree(demo_images / "val", tmp_path / "val")
    (tmp_path / 'val/ring/a\r\n"odd", name.JPEG').write_bytes(b"")
    images = read_image_folder(str(tmp_path), "val", "data.val_dir")
    rng = np.random.default_rng(0)
    said = []
    for protocol in ("short side 37 bilinear, centre crop 32", "another, with a comma"):
        predicted = rng.integers(0, 9, len(images))  # the tenth class is never predicted, but true
        confidence, truth = rng.random((2, len(images)))
        said.append((protocol, Evaluation(images.labels, predicted, rng.random(len(images)) < 0.5, confidence, truth)))
    (tmp_path / "predictions.csv").write_bytes(encode_predictions(images, said))
    back = read_predictions(tmp_path / "predictions.csv")
    for (protocol, written), read in zip(said, back, strict=True):
        assert (read.protocol, read.classes) == (protocol, images.classes)
        assert read.files.tolist() == [images.name(index) for index in range(len(images))]
        for name in ("labels", "predicted", "in_top5"):
            np.testing.assert_array_equal(getattr(read.evaluation, name), getattr(written, name))
        np.testing.assert_allclose(read.evaluation.confidence, written.confidence, rtol=1e-5)
        np.testing.assert_allclose(read.evaluation.true_probability, written.true_probability, rtol=1e-5)
        assert (read.evaluation.top1, read.evaluation.correct5) == (written.top1, written.correct5)


def test_names_are_no_formulas(demo_images, tmp_path):
    names = ['=HYPERLINK("x")', "+1", "-2+3", "@SUM(A1)", "'=1", "''", "plain", "\t=1"]
    for name in names:
        (tmp_path / "val" / name).mkdir(parents=True)
        shutil.copy(demo_images / "val/disk/disk_0_00000.JPEG", tmp_path / "val" / name / "=.jpg")
    images = read_image_folder(str(tmp_path), "val", "data.val_dir")
    sure = np.ones(len(images))
    evaluation = Evaluation(images.labels, np.roll(images.labels, 1), sure > 0, sure, sure)
    (tmp_path / "predictions.csv").write_bytes(encode_predictions(images, [("p", evaluation)]))
    with open(tmp_path / "predictions.csv", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+\-@\t\r]", cell)] and "'-2+3" in cells and "plain" in cells
    (back,) = read_predictions(tmp_path / "predictions.csv")
    assert back.classes == images.classes and back.evaluation.labels.tolist() == images.labels.tolist()
    assert back.evaluation.predicted.tolist() == evaluation.predicted.tolist()


def test_no_table_has_formulas(tmp_path):
    from resnest_imagenet.reports import explain_pictures  # late: it imports matplotlib

    name = "=1+1"
    predictions = [predict.Prediction(name, 1, name, "-x", 0.5)]
    images = ImageFolder(Path(name), (name,), np.array([b"1.jpg"]), np.zeros(1, dtype=np.int64))
    values = np.full((1, 1), 0.5)
    compared = Comparison((name,), images, (name,), values, np.array([[name]]), values > 0, values > 0, ("p",))
    measured = Measured("resnest50", 224, 80.0, 1, 1, "@x", "p", "+x")
    counted = dict.fromkeys(("parameters_paper", "parameters", "gflops_paper", "gflops"), 1.0)
    counted |= {"row": "ResNeSt-50", "model": "resnest50", "top1_paper": {224: 81.13}}
    attention = {"layer1.0": np.zeros((1, 2, 4), dtype=np.float32)}
    for text in (
        predict.encode_predictions(predictions, ".csv"),
        compare.encode_csv(compared),
        explain_pictures.encode_csv([name], attention),
        format_table([{**counted, "measured": [vars(measured)]}], "csv"),
    ):
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        assert any(cell.startswith("'") for cell in cells)
        assert not [cell for cell in cells if re.match(r"[=+\-@]", cell)]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "x" * 200_000, None])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "predictions.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"predictions.csv: not the predictions of an evaluation"):
        read_predictions(path)
