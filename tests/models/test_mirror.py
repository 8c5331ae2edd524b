import numpy as np
import pytest
import torch
from torch import nn

from conftest import ALONE
from forked import compute_on_ranks
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.errors import NonFiniteError
from resnest_imagenet.evaluation.accuracy import measure_accuracy
from resnest_imagenet.models.mirror import average_views, name_protocol

CLASSES = 7


class Rows(nn.Module):
    """The logits of an image are its first row of pixels: those of its mirror image are in the other order."""

    def forward(self, images):
        return images[:, 0, 0]


class Batches:
    """A loader of drawn images, by the plan of a rank."""

    def __init__(self, images, rank, world_size):
        self.images = images
        self.plan = plan_evaluation(len(images), 2, rank, world_size)

    def batches(self, epoch, start=0):
        for samples in self.plan.batches(epoch):
            yield self.images[samples], torch.from_numpy(samples) % CLASSES


def draw_images():
    return 4 * torch.randn(11, 3, 2, CLASSES, generator=torch.Generator().manual_seed(0))


def test_the_mean_of_the_probabilities():
    images = draw_images()
    averaged = average_views(Rows(), "flip")(images)
    rows = images[:, 0, 0].double().numpy()
    exps = [np.exp(view) for view in (rows, rows[:, ::-1])]
    expected = sum(exp / exp.sum(1, keepdims=True) for exp in exps) / 2
    np.testing.assert_allclose(averaged.softmax(1), expected, rtol=1e-5)
    np.testing.assert_allclose(averaged.exp(), expected, rtol=1e-5)  # logarithms already
    network = Rows()
    assert average_views(network, None) is network
    assert name_protocol("p", "flip") != name_protocol("p", None) == "p"


def test_probabilities_that_are_0_are_no_fault_and_logits_that_are_not_finite_are():
    image = torch.full((1, 3, 2, CLASSES), -300.0)
    image[..., 0] = 300
    averaged = average_views(Rows(), "flip")(image)
    assert averaged.isfinite().all() and averaged.exp()[0].tolist() == pytest.approx([0.5, 0, 0, 0, 0, 0, 0.5])
    images = draw_images()
    images[3, 0, 0, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="^3: its logits are not finite"):
        measure_accuracy(average_views(Rows(), "flip"), Batches(images, 0, 1), ALONE)


def measure_on_rank(ranks):
    loader = Batches(draw_images(), ranks.rank, ranks.world_size)
    evaluation = measure_accuracy(average_views(Rows(), "flip"), loader, ranks)
    return list(vars(evaluation).values())


@pytest.mark.process
def test_any_number_of_ranks():
    alone = measure_on_rank(ALONE)
    for columns in compute_on_ranks(measure_on_rank, 3):  # 11 images
        for column, expected in zip(columns, alone, strict=True):
            np.testing.assert_array_equal(column, expected)
