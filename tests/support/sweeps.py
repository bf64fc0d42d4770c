"""Sweeps of tiny cells: how they are chosen, and those that run in a process of their own."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from resblock_bench.bench.records import Row
from resblock_bench.bench.runs.folder import read_run

TINY = ("-a", "channels=32", "-a", "resolution=4", "-a", "batch=1", "-a", "mode=inference")
QUICK = ("--samples", "6", "--threads", "1", "--no-plots")


def rows_of(folder: Path) -> dict[str, Row]:
    return {row.axes.impl: row for row in read_run(folder).rows}


def started(
    folder: Path, *more: str, impl: str = "reference", cells: int = 300, **options: Any
) -> "subprocess.Popen[str]":
    """A sweep of some hundred cells in a process of its own."""
    arguments = ["run", *QUICK, "-a", f"batch=[1:{cells}:+1]", "-a", f"impl={impl}"]
    arguments += ["-a", "channels=32", "-a", "resolution=4", "-a", "mode=inference"]
    return spawned(*arguments, "--output", str(folder), *more, **options)


def spawned(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "resblock_bench.bench", *arguments]
    # A shell's background jobs ignore Ctrl-C, and so would this process.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for_rows(process: "subprocess.Popen[str]", folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    cells = folder / "cells.jsonl"
    while not cells.exists() or cells.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
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


def wait_for_hanging(process: "subprocess.Popen[str]") -> int:
    """The process of a cell that has come to hang."""
    deadline = time.monotonic() + 300
    while True:
        for pid in children_of(process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "hanging\n":
                    return pid
        assert process.poll() is None, process.communicate()
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
