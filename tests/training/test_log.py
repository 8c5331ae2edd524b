import numpy as np

from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.evaluation.counting import Evaluation
from resnest_imagenet.evaluation.predictions import write_predictions
from resnest_imagenet.training.log import _drop_other_predictions


def test_predictions_of_another_than_the_best_network_go(demo_images, tmp_path):
    """As a run leaves them that dies between them and its checkpoint."""
    images = read_image_folder(str(demo_images), "val", "data.val_dir")
    said = Evaluation(images.labels, images.labels * 0, images.labels > 5, *np.full((2, len(images)), 0.5))
    path = tmp_path / "predictions.csv"
    _drop_other_predictions(path, said.top1)  # there is none yet
    for best_top1, stays in ((said.top1, True), (said.top1 + 2.5, False)):
        write_predictions(path, images, [("centre crop 32", said)])
        _drop_other_predictions(path, best_top1)
        assert path.exists() == stays
    path.write_text("cut")
    _drop_other_predictions(path, said.top1)
    assert not path.exists()
