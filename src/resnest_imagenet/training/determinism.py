"""train.deterministic: the same bits from the same run on CUDA too, or one line about what has no kernel for that."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from resnest_imagenet.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS when it starts
_FIXED = (":4096:8", ":16:8")  # the values with which cuBLAS adds in a fixed order, by its manual


def fix_workspace() -> None:
    """Let cuBLAS add in a fixed order, which it takes from the environment when CUDA starts; the process keeps it.

    Raises:
        ConfigError: the environment has another value, or CUDA runs already without one.
    """
    value = os.environ.get(WORKSPACE)
    if value is None and torch.cuda.is_initialized():
        raise ConfigError(f"train.deterministic=true: CUDA runs already: set {WORKSPACE}={_FIXED[0]} before it starts")
    if value not in (None, *_FIXED):
        raise ConfigError(f"train.deterministic=true: {WORKSPACE}={value} is set: unset it, or set it to {_FIXED[0]}")
    os.environ.setdefault(WORKSPACE, _FIXED[0])


@contextmanager
def fixing_kernels(is_wanted: bool) -> Iterator[None]:
    """Let torch choose kernels that add in a fixed order, if wanted, and restore its settings at the end.

    An operator without such a kernel raises a RuntimeError, of which `errors.explain_runtime` makes a line.
    """
    if not is_wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # torch's stub lacks its attribute
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    # torch would fill what it allocates, and so pass over all memory twice: nothing here is read before it is written.
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
