"""What a trainer imports: in the server from which the trainers of the fault test are forked."""

import hydra  # noqa: F401
import torch._dynamo  # the first optimiser imports it
import torch.utils.tensorboard  # noqa: F401
import torchvision  # noqa: F401

import resnest_imagenet.commands.train
import resnest_imagenet.data.dali
import resnest_imagenet.data.torchvision
import resnest_imagenet.evaluation.charts
import resnest_imagenet.training.train  # noqa: F401
from faults import composing, harness

composing.compose_train(harness.SMALL)
composing.compose_train((*harness.SMALL, *harness.TINY))
