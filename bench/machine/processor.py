"""The processor's counters and the tree of processes, from /proc and /sys.

`root` is where these hang. CPU times come in ticks, a hundredth of a second on most machines.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class CpuReading(NamedTuple):
    """The mean clock of the usable CPUs, and CPU seconds since the start of machine or process.

    `busy_s` is all CPUs' time that is neither idle nor stolen, `own_s` this process's and that of
    its children that have ended, `stolen_s` what the hypervisor gave to other machines.
    """

    mhz: float | None
    busy_s: float | None
    own_s: float | None
    stolen_s: float | None
    notes: list[str]


def read_cpu(root: Path = Path("/")) -> CpuReading:
    """The counters now; None and a note where a file is missing or strange."""
    notes = []
    busy_s = own_s = stolen_s = None
    try:
        busy_s, stolen_s = _machine_s(root)
        own_s = _own_s(root)
    except (OSError, ValueError, IndexError) as error:
        notes.append(f"CPU times cannot be read: {error}")
    return CpuReading(_mhz(root), busy_s, own_s, stolen_s, notes)


def is_relative(pid: int, root: Path = Path("/")) -> bool:
    """Whether the process is this one, or one of its ancestors or descendants."""
    own = os.getpid()
    return pid == own or pid in _ancestors(own, root) or own in _ancestors(pid, root)


def _machine_s(root: Path) -> tuple[float, float]:
    name, *ticks = (root / "proc/stat").read_text().splitlines()[0].split()
    if name != "cpu":
        raise ValueError("/proc/stat does not begin with the line of all CPUs")
    # Guests' time, in the columns behind these, is contained in the user's.
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S, steal / _TICKS_PER_S


def _own_s(root: Path) -> float:
    # utime, stime and those of the children that were waited for
    return sum(map(int, _status(os.getpid(), root)[11:15])) / _TICKS_PER_S


def _status(pid: int, root: Path) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may itself hold blanks and brackets."""
    return (root / f"proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ancestors(pid: int, root: Path) -> set[int]:
    found: set[int] = set()
    while pid > 0:
        try:
            pid = int(_status(pid, root)[1])
        except (OSError, ValueError, IndexError):  # it has ended, or is not shown
            break
        if pid in found:
            break
        found.add(pid)
    return found


def _mhz(root: Path) -> float | None:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    folder = root / "sys/devices/system/cpu"
    try:
        found = [
            int((folder / f"cpu{cpu}/cpufreq/scaling_cur_freq").read_text()) / 1e3 for cpu in usable
        ]
    except (OSError, ValueError):
        found = _cpuinfo_mhz(root, usable)
    return sum(found) / len(found) if found else None


def _cpuinfo_mhz(root: Path, usable: set[int]) -> list[float]:
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return []
    numbers = re.findall(r"^processor\s*:\s*(\d+)", text, re.MULTILINE)
    clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)
    return [float(mhz) for cpu, mhz in zip(numbers, clocks, strict=False) if int(cpu) in usable]
