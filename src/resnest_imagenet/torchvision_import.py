"""Imports torchvision without torch's compiler, which takes longer to import than torch itself."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from resnest_imagenet.errors import explaining_runtime

_UTILS = "torch._dynamo.utils"


@contextmanager
def importing_torchvision() -> Iterator[None]:
    """Around the imports of torchvision, and of timm, which imports it.

    torchvision asks for torch's compiler when it is imported: `ops.roi_align` for the name of a function, `tv_tensors`
    to exclude a function from compilation. Here they ask when they are called. What else is asked for meanwhile is
    imported as ever.

    Raises:
        UserError: torchvision was built for another torch.
    """
    with explaining_runtime():
        if _UTILS in sys.modules:
            yield
            return
        disable, utils = torch.compiler.disable, _Utils(_UTILS)
        sys.modules[_UTILS] = utils
        torch.compiler.disable = _disable_late
        try:
            yield
        finally:
            torch.compiler.disable = disable
            utils.leave()


class _Utils(ModuleType):
    """Stands for a part of torch's compiler until a name is asked of it that is not here."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        from torch._dynamo.utils import is_compile_supported

        return is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of the import system
            raise AttributeError(name)
        self.leave()
        from torch._dynamo import utils

        return getattr(utils, name)

    def leave(self) -> None:
        """Make room for the real part."""
        if sys.modules.get(_UTILS) is self:
            del sys.modules[_UTILS]


def _disable_late(fn: Any = None, recursive: Any = True, *, reason: Any = None) -> Any:
    """Do what `torch.compiler.disable` does, as torch does it for its own functions: when they are called."""
    return torch._disable_dynamo(fn, recursive)
