"""The machine and the software of a run, gathered without root and without changing anything."""

import importlib.metadata
import math
import os
import platform
import re
from pathlib import Path

import torch

from resblock_bench.bench.checkout import source_state
from resblock_bench.bench.records import Environment

from . import nvml

_PACKAGES = ("torch", "triton", "numpy", "resblock-bench")


def gather(threads: int) -> Environment:
    """Everything that a row's numbers depend on and that can be read here; null where unknown."""
    gpu = torch.cuda.get_device_properties() if torch.cuda.is_available() else None
    commit, dirty = source_state(Path(__file__).resolve().parent)
    return Environment(
        machine=machine_name(),
        cpu=cpu_model(),
        physical_cores=physical_cores(),
        logical_cores=os.cpu_count(),
        usable_cpus=usable_cpus(),
        memory_bytes=memory_bytes(),
        gpu=gpu.name if gpu else None,
        gpu_memory_bytes=gpu.total_memory if gpu else None,
        gpu_uuid=str(gpu.uuid) if gpu else None,
        gpu_driver=nvml.driver_version() if gpu else None,
        os=platform.platform(),
        threads=threads,
        versions=versions(),
        commit=commit,
        dirty=dirty,
        ceilings=None,
    )


def machine_name() -> str:
    """The host's name as a folder name; RESBLOCK_BENCH_MACHINE overrides it.

    Containers are given a new host name at every start, which would scatter a machine's runs.
    """
    name = os.environ.get("RESBLOCK_BENCH_MACHINE") or platform.node()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"


def cpu_model(root: Path = Path("/")) -> str | None:
    """The processor's marketing name."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or None


def physical_cores(root: Path = Path("/")) -> int | None:
    """Cores without their hyperthreads."""
    text = _read(root / "proc/cpuinfo")
    sockets = re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)", text, re.MULTILINE)
    return len(set(zip(sockets, cores, strict=False))) or None


def usable_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may keep busy: its affinity mask and its cgroup's quota.

    In a container PyTorch otherwise starts a thread for every core of the host.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_quota(root)
    usable = count or 1
    return usable if quota is None else max(1, min(usable, math.ceil(quota)))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the cgroup (version 2 or 1) grants, or None without a limit."""
    fields = _read(root / "sys/fs/cgroup/cpu.max").split()
    if not fields:
        old = root / "sys/fs/cgroup/cpu"
        fields = [_read(old / "cpu.cfs_quota_us"), _read(old / "cpu.cfs_period_us")]
    try:
        quota, period = int(fields[0]), int(fields[1])
    except (IndexError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def memory_bytes() -> int | None:
    """The machine's main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict[str, str | None]:
    """Python's and the packages' versions, CUDA's and cuDNN's as PyTorch was built with them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)  # carries the build, such as +cpu
    found["cuda"] = torch.version.cuda
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found["cudnn"] = str(cudnn) if cudnn else None
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
