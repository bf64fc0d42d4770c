"""Sweeps of tiny cells: how they are chosen, and those that run in a process of their own."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from resblock_bench.bench.records import Row
from resblock_bench.bench.runs.folder import read_run

TINY = ("-a", "channels=32", "-a", "resolution=4", "-a", "batch=1", "-a", "mode=inference")
QUICK = ("--samples", "6", "--threads", "1", "--no-plots")


def rows_of(folder: Path) -> dict[str, Row]:
    return {row.axes.impl: row for row in read_run(folder).rows}


def many(impl: str, cells: int = 300) -> list[str]:
    """The arguments of a sweep of some hundred cells."""
    arguments = ["run", *QUICK, "-a", f"batch=[1:{cells}:+1]", "-a", f"impl={impl}"]
    return [*arguments, "-a", "channels=32", "-a", "resolution=4", "-a", "mode=inference"]


def started(
    folder: Path, *more: str, impl: str = "reference", cells: int = 300, **options: Any
) -> "subprocess.Popen[str]":
    """Such a sweep in a process of its own, on a machine whose ceilings nobody measures."""
    arguments = [*many(impl, cells), "--output", str(folder), *more]
    return spawned(*arguments, module="without_ceilings", **options)


def spawned(
    *arguments: str, module: str = "resblock_bench.bench", **options: Any
) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    # A shell's background jobs ignore Ctrl-C, and so would this process.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """What another thread does to the sweep that this one carries out."""
    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(act)
        yield
        acted.result()


def wait_for_rows(folder: Path, count: int, process: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + 300
    cells = folder / "cells.jsonl"
    while not cells.exists() or cells.read_bytes().count(b"\n") < count:
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> set[int]:
    """All processes under one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


def wait_for_hanging(parent: int, process: "subprocess.Popen[str] | None" = None) -> int:
    """The process of a cell that has come to hang, somewhere under `parent`."""
    deadline = time.monotonic() + 300
    while True:
        for pid in children_of(parent):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "hanging\n":
                    return pid
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_death(pids: set[int]) -> None:
    """What the kernel still does for a killed process takes a moment."""
    deadline = time.monotonic() + 120
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a cell outlived the suite"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
