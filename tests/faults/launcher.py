"""torchrun in a process that has imported what its ranks need, and leaves at once: Python's own end takes a second."""

import os
import sys
import traceback

from torch.distributed.run import main

import faults.preload  # noqa: F401

if __name__ == "__main__":
    code = 0
    try:
        main()
    except BaseException:  # as Python would end: with the traceback, and 1
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)
