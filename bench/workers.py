"""Worker processes in which Triton's kernels are interpreted, or compiled: never both in one.

Imports nothing of the project: a worker imports this module before it knows which it is to be, and
a kernel is one or the other from the moment it is defined.
"""

import multiprocessing
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor


def pool(
    workers: int, *, interpret: bool, environ: Mapping[str, str] | None = None
) -> ProcessPoolExecutor:
    """Fresh processes with TRITON_INTERPRET set or unset, whatever it is in this one.

    `environ`: further variables, for libraries that read them when they are imported.
    """
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_settle,
        initargs=({**(environ or {}), "TRITON_INTERPRET": "1" if interpret else "0"},),
    )


def _settle(environ: dict[str, str]) -> None:
    os.environ.update(environ)
    # A terminal sends Ctrl-C to every process; the one that waits for this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
