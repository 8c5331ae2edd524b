"""torchrun in a process that has imported what its ranks need, and leaves at once: Python's own end takes a second."""

import os
import sys
import traceback

import hydra  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
from torch.distributed.run import main

import resnest_imagenet.commands.train
import resnest_imagenet.training.train  # noqa: F401

if __name__ == "__main__":
    code = 0
    try:
        main()
    except BaseException:  # as Python would end: with the traceback, and 1
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)
