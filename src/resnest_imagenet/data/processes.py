"""Worker processes that do not outlive the one that started them, however that one ends."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
# Forked processes see their parent end, and need not import torch again, each for seconds.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def end_with_parent(parent: int) -> None:
    """Let the system kill this process when the one that started it is gone; on Linux, elsewhere nothing happens.

    Called in the worker. A worker that waits for a storage or in a decoder does not look at its parent itself.

    Args:
        parent: the process that started this one, from the main thread: the system watches that thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # gone before the call
            os._exit(1)
