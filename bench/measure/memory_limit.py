"""How much memory a CPU cell may take, and how to tell when the system took it back.

A cell that wants more than there is would be ended by the kernel's out-of-memory killer, and maybe
not it alone. Under a limit its allocation fails instead, with PyTorch's own error.

The limit is RLIMIT_DATA, on private writable memory, which the kernel counts as VmData. RLIMIT_AS
would also count what only takes up addresses: shared libraries, files mapped read-only, and the
64 MiB that the C library sets apart for every thread's heap.
"""

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")
_DEFAULT_STACK = 8 * 2**20
_SPARE_THREADS = 2  # beside PyTorch's own: autograd's, a progress thread's


def limit_memory(bytes_: int, root: Path = ROOT) -> bool:
    """Let this process allocate `bytes_` more than it has now; whether the system can do that.

    The stacks of threads yet to be started come on top: all of a stack counts as allocated, though
    next to nothing of it is ever used.
    """
    held = _field(root / "proc/self/status", "VmData")
    if held is None:
        return False
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held * 1024 + bytes_ + _stack_bytes()
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return True


def _stack_bytes() -> int:
    each, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if each == resource.RLIM_INFINITY:
        each = _DEFAULT_STACK
    return each * (torch.get_num_threads() + _SPARE_THREADS)


def available_bytes(root: Path = ROOT) -> int | None:
    """What may be allocated now without swapping, or None where the system does not say.

    The least of the machine's MemAvailable and, for each cgroup that this process is in, its limit
    minus its usage; file pages not used lately are no usage, as the kernel gives them up first.
    """
    found = []
    available = _field(root / "proc/meminfo", "MemAvailable")
    if available is not None:
        found.append(available * 1024)
    for folder, names in _cgroups(root):
        limit, usage = (_number(folder / name) for name in names[:2])
        if limit is not None and usage is not None:
            cached = _field(folder / "memory.stat", names[2]) or 0
            found.append(max(0, limit - (usage - cached)))
    return min(found, default=None)


def oom_kills(root: Path = ROOT) -> int | None:
    """How many processes the kernel has killed for want of memory, or None where it does not say.

    Those of this process's cgroup; the whole system's where the cgroup does not count. A SIGKILL
    with a higher count after it than before was the kernel's.
    """
    for folder, _ in _cgroups(root):
        for name in ("memory.events", "memory.oom_control"):
            kills = _field(folder / name, "oom_kill")
            if kills is not None:
                return kills
    return _field(root / "proc/vmstat", "oom_kill")


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The memory cgroups around this process, innermost first, and what their figures are called.

    A container often sees its own cgroup where the outermost should be, and its path not at all.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
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


def _field(path: Path, name: str) -> int | None:
    """The number after a name at the start of a line: 'name: 1 kB' or 'name 1'."""
    match = re.search(rf"^{name}:?\s+(\d+)", _read(path), re.MULTILINE)
    return int(match[1]) if match else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
