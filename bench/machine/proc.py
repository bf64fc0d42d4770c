"""What Linux says of processor, memory and processes in /proc and /sys, cgroups included.

`root` is where these hang. What cannot be read is None.
"""

import contextlib
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
# CPU times come in ticks, a hundredth of a second on most machines.
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


def read_cpu(root: Path = ROOT) -> CpuReading:
    """The counters now; None and a note where a file is missing or strange."""
    notes = []
    busy_s = own_s = stolen_s = None
    try:
        busy_s, stolen_s = _machine_s(root)
        own_s = _own_s(root)
    except (OSError, ValueError, IndexError) as error:
        notes.append(f"CPU times cannot be read: {error}")
    return CpuReading(_mhz(root), busy_s, own_s, stolen_s, notes)


def is_relative(pid: int, root: Path = ROOT) -> bool:
    """Whether the process is this one, or one of its ancestors or descendants."""
    own = os.getpid()
    return pid == own or pid in _ancestors(own, root) or own in _ancestors(pid, root)


def waited_for_cpu_s(pid: int, root: Path = ROOT) -> float:
    """Seconds that a process's threads were ready to run and had no CPU, of all together; those
    that have ended and what cannot be read count nothing."""
    waited_ns = 0
    for path in (root / f"proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            waited_ns += int(path.read_text().split()[1])  # running, waiting, time slices
    return waited_ns / 1e9


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


def descendants(pid: int, root: Path = ROOT) -> set[int]:
    """The processes under one that still run; none where the system shows none."""
    parents: dict[int, int] = {}
    for folder in (root / "proc").glob("[0-9]*"):
        try:
            state, parent, *_ = _status(int(folder.name), root)
        except (OSError, ValueError):  # it has ended
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found: set[int] = set()
    while more := {one for one, parent in parents.items() if parent in {pid, *found}} - found:
        found |= more
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
    text = read(root / "proc/cpuinfo")
    numbers = re.findall(r"^processor\s*:\s*(\d+)", text, re.MULTILINE)
    clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)
    return [float(mhz) for cpu, mhz in zip(numbers, clocks, strict=False) if int(cpu) in usable]


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's marketing name."""
    match = re.search(r"^model name\s*:\s*(.+)$", read(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or None


def physical_cores(root: Path = ROOT) -> int | None:
    """Cores without their hyperthreads."""
    text = read(root / "proc/cpuinfo")
    sockets = re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)", text, re.MULTILINE)
    return len(set(zip(sockets, cores, strict=False))) or None


def last_cpus(count: int) -> list[int]:
    """So many of the CPUs that this process may use; none where the system does not tell.

    Neighbours of a virtual machine slow its CPUs apart from each other: on the same ones processes
    go through the same slow spells. The first ones serve more interrupts.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[-count:]


def usable_cpus(root: Path = ROOT) -> int:
    """How many CPUs this process may keep busy: its affinity mask and its cgroup's quota.

    In a container PyTorch otherwise starts a thread for every core of the host.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_quota(root)
    usable = count or 1
    return usable if quota is None else max(1, min(usable, math.ceil(quota)))


def cgroup_quota(root: Path = ROOT) -> float | None:
    """CPUs that the cgroup (version 2 or 1) grants, or None without a limit."""
    fields = read(root / "sys/fs/cgroup/cpu.max").split()
    if not fields:
        old = root / "sys/fs/cgroup/cpu"
        fields = [read(old / "cpu.cfs_quota_us"), read(old / "cpu.cfs_period_us")]
    try:
        quota, period = int(fields[0]), int(fields[1])
    except (IndexError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def available_bytes(root: Path = ROOT) -> int | None:
    """What may be allocated now without swapping, or None where the system does not say.

    The least of the machine's MemAvailable and, for each cgroup that this process is in, its limit
    minus its usage; file pages not used lately are no usage, as the kernel gives them up first.
    """
    found = []
    available = field(root / "proc/meminfo", "MemAvailable")
    if available is not None:
        found.append(available * 1024)
    for folder, names in _cgroups(root):
        limit, usage = (number(folder / name) for name in names[:2])
        if limit is not None and usage is not None:
            cached = field(folder / "memory.stat", names[2]) or 0
            found.append(max(0, limit - (usage - cached)))
    return min(found, default=None)


def cgroup_memory(root: Path = ROOT) -> int | None:
    """Bytes that the tightest cgroup around this process grants, or None without a limit."""
    limits = [number(folder / names[0]) for folder, names in _cgroups(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def oom_kills(root: Path = ROOT) -> int | None:
    """How many processes the kernel has killed for want of memory, or None where it does not say.

    Those of this process's cgroup; the whole system's where the cgroup does not count. A SIGKILL
    with a higher count after it than before was the kernel's.
    """
    for folder, _ in _cgroups(root):
        for name in ("memory.events", "memory.oom_control"):
            kills = field(folder / name, "oom_kill")
            if kills is not None:
                return kills
    return field(root / "proc/vmstat", "oom_kill")


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The memory cgroups around this process, innermost first, and what their figures are called.

    A container often sees its own cgroup where the outermost should be, and its path not at all.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            if (mount / folder).is_dir():
                yield mount / folder, names


def personality(root: Path = ROOT) -> int:
    """The flags of personality(2) that this process has; none where they are not shown."""
    return int(read(root / "proc/self/personality") or "0", 16)


def field(path: Path, name: str) -> int | None:
    """The number after a name at the start of a line: 'name: 1 kB' or 'name 1'."""
    match = re.search(rf"^{name}:?\s+(\d+)", read(path), re.MULTILINE)
    return int(match[1]) if match else None


def number(path: Path) -> int | None:
    """The whole content as a number; None where it is none."""
    text = read(path)
    return int(text) if text.isdigit() else None


def read(path: Path) -> str:
    """The content without blanks around it, empty where there is none to be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
