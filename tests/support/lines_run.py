"""Which lines of bench/ a process has run, for who asks what no rehearsal has run."""

import atexit
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_ROOMS = tuple(f"/bench/{room}" for room in ("measure/", "lockstep/", "gpu/", "tune/"))
_run: set[tuple[str, int]] = set()


def note(folder: str) -> None:
    """Trace this process, its threads and what it forks; each leaves a file at its end."""
    sys.settrace(_trace)
    threading.settrace(_trace)
    atexit.register(_write, folder)
    leave = os._exit

    def leave_noted(code: int) -> None:
        _write(folder)
        leave(code)

    os._exit = leave_noted  # type: ignore[assignment]


def _trace(frame: FrameType, event: str, argument: object) -> Any:
    return _line if any(room in frame.f_code.co_filename for room in _ROOMS) else None


def _line(frame: FrameType, event: str, argument: object) -> Any:
    if event == "line":
        _run.add((frame.f_code.co_filename, frame.f_lineno))
    return _line


def _write(folder: str) -> None:
    lines = [f"{Path(name).resolve()}:{number}" for name, number in _run]
    (Path(folder) / f"{os.getpid()}-{len(lines)}").write_text("\n".join(lines))
