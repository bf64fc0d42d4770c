"""A process that does not outlive the one that started it."""

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Where the kernel can: a killed suite leaves nothing behind that goes on computing.

    parent   its number; None where multiprocessing knows it
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before this could be asked for.
    if parent is not None:
        gone = os.getppid() != parent
    else:
        known = multiprocessing.parent_process()
        gone = known is not None and not known.is_alive()
    if gone:
        os._exit(1)
