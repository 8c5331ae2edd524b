"""Worker processes that end with the process that started them, however it ends."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
# Forked processes can watch their parent, and save the seconds of importing torch again.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def end_with_parent(parent: int) -> None:
    """Make the system kill this process when its parent ends. Does nothing on other systems than Linux.

    Call it in the worker. A worker that hangs in the storage or in a decoder cannot check for its parent itself.

    Args:
        parent: the id of the parent. It must have started this process from its main thread: the system watches the
            thread, not the process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)
