import shutil

import numpy as np
import pytest

from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.counting import Evaluation
from resnest_imagenet.evaluation.predictions import read_predictions, write_predictions


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
    write_predictions(tmp_path / "predictions.csv", images, said)
    back = read_predictions(tmp_path / "predictions.csv")
    for (protocol, written), read in zip(said, back, strict=True):
        assert (read.protocol, read.classes) == (protocol, images.classes)
        assert read.files.tolist() == [images.name(index) for index in range(len(images))]
        for name in ("labels", "predicted", "in_top5"):
            np.testing.assert_array_equal(getattr(read.evaluation, name), getattr(written, name))
        np.testing.assert_allclose(read.evaluation.confidence, written.confidence, rtol=1e-5)
        np.testing.assert_allclose(read.evaluation.true_probability, written.true_probability, rtol=1e-5)
        assert (read.evaluation.top1, read.evaluation.correct5) == (written.top1, written.correct5)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "x" * 200_000, None])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "predictions.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"predictions.csv: not the predictions of an evaluation"):
        read_predictions(path)
