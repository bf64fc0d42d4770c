"""Processes that do not outlive the one that started them."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time

from .proc import descendants

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_TRIES = 100
_WAIT_S = 0.01


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


def adopt_orphans() -> None:
    """Where the kernel can: what this process's descendants leave behind becomes its own child, so
    that a daemon in a session of its own is found under it, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(pid: int) -> None:
    """Kill all that a process has started, whatever session or group it is in.

    The process itself stays, and must have called `adopt_orphans`: each that is killed leaves its
    children to it. Another one's must be stopped (SIGSTOP), so that it starts no more.
    """
    for _ in range(_TRIES):
        left = descendants(pid)
        if not left:
            return
        for each in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(_WAIT_S)


def end_tree(pid: int) -> None:
    """Kill a process and all that it has started, as `end_descendants` does."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)
        end_descendants(pid)
        os.kill(pid, signal.SIGKILL)
