"""A process that does not outlive the one that started it."""

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def die_with_parent() -> None:
    """Where the kernel can: a killed suite leaves nothing behind that goes on computing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it died before this could be asked for
            os._exit(1)
