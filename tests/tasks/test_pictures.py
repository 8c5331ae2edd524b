import io

import numpy as np
import torch
from PIL import Image

from resnest_imagenet.data.transforms import MEAN, STD
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.tasks.pictures import draw_confusions, draw_samples


def judge(labels, predicted):
    return Evaluation(labels, predicted, *np.zeros((3, len(labels))))


def size_of(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return len(file.getvalue())


def test_a_thousand_classes_have_a_pixel_each():
    """An image of each class; class n is taken for 999 - n."""
    labels = np.arange(1000)
    picture = draw_confusions(judge(labels, labels[::-1]), [str(label) for label in labels], "title")
    dark = (picture[:, :1080].astype(int).sum(-1) < 300) & (picture[:, :1080, 2] > picture[:, :1080, 0] + 40)  # blue
    rows, columns = np.nonzero(dark)
    assert len(set(rows)) >= 1000 and len(set(columns)) >= 1000
    assert abs(np.corrcoef(rows, columns)[0, 1] + 1) < 1e-3
    assert size_of(picture) < 150_000


def test_more_classes_share_cells_and_any_name_can_be_drawn():
    labels = np.arange(21841)
    assert size_of(draw_confusions(judge(labels, labels), ["x"] * 21841, "title")) < 150_000
    names = ["a\nb", "\udcff", "$x", "a name of more than twenty characters"]
    picture = draw_confusions(judge(labels % 4, labels % 4), names, "title")
    assert picture.shape == (630, 700, 3) and picture.dtype == np.uint8


def test_cells_have_the_share_of_the_true_class():
    from matplotlib.figure import Figure

    from resnest_imagenet.evaluation.charts import paint_confusions  # late: it imports matplotlib

    confusions = np.array([[3, 1, 0], [0, 0, 2], [0, 0, 0]])
    axes = Figure().add_subplot()
    paint_confusions(axes, confusions, ["a", "b", "c"])
    shares = axes.images[0].get_array()
    assert shares.filled(0).tolist() == [[0.75, 0.25, 0], [0, 0, 1], [0, 0, 0]]
    assert shares.mask.sum() == 6  # without a mark
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((0, 0), "3"), ((1, 0), "1"), ((2, 1), "2")}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_cells_of_pixels_have_percent_of_the_true_class():
    from matplotlib.figure import Figure

    from resnest_imagenet.evaluation.charts import paint_confusions  # late: it imports matplotlib

    axes = Figure().add_subplot()
    paint_confusions(axes, np.array([[99_000, 600, 400], [0, 10**12, 10**9], [0, 0, 0]]), ["a", "b", "c"], True)
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((0, 0), "99"), ((1, 0), "1"), ((1, 1), "100")}


def test_samples_are_what_they_were_before_the_normalisation():
    pixels = torch.randint(0, 256, (3, 3, 32, 32))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    sheet = draw_samples((pixels - mean) / std)
    assert sheet.shape == (72, 72, 3)
    for number, (top, left) in enumerate(((2, 2), (2, 38), (38, 2))):
        assert (sheet[top : top + 32, left : left + 32] == pixels[number].permute(1, 2, 0).numpy()).all()
    assert (sheet[36:, 36:] == 255).all()
