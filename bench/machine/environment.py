"""The machine and the software of a run, gathered without root and without changing anything."""

import hashlib
import importlib.metadata
import os
import platform
import re
import unicodedata
from pathlib import Path

import torch

from resblock_bench.bench.checkout import source_state
from resblock_bench.bench.records import MACHINE, Environment

from . import nvml
from .proc import cpu_model, physical_cores, usable_cpus

_NAME_BYTES = 200  # a file system holds 255
_PACKAGES = ("torch", "triton", "numpy", "resblock-bench")
_DECIDING = ("machine", "cpu", "logical_cores", "usable_cpus", "gpu", "gpu_driver", "threads")
_DECIDING_PACKAGES = ("python", "torch", "triton", "numpy", "cuda", "cudnn")
"""What of an environment changes what a cell costs."""


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


def difference(before: Environment, now: Environment) -> str | None:
    """The first thing in which two environments differ that changes what a cell costs, or None."""
    for field in _DECIDING:
        if getattr(before, field) != getattr(now, field):
            return f"{field} was {getattr(before, field)} and is {getattr(now, field)}"
    for name in _DECIDING_PACKAGES:
        if before.versions.get(name) != now.versions.get(name):
            return f"{name} was {before.versions.get(name)} and is {now.versions.get(name)}"
    return None


def machine_name() -> str:
    """The host's name as a folder name; RESBLOCK_BENCH_MACHINE overrides it.

    Containers are given a new host name at every start, which would scatter a machine's runs.

    It is an identity: two names give two folders. One that is no folder name as it stands has a
    digest of itself behind what is left of it.
    """
    name = os.environ.get("RESBLOCK_BENCH_MACHINE") or platform.node() or "unnamed"
    name = unicodedata.normalize("NFC", name)
    if re.fullmatch(MACHINE, name) and len(os.fsencode(name)) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    left = re.sub(r"[^\w.-]+", "-", name).strip("-.")[: _NAME_BYTES // 4]
    return f"{left or 'unnamed'}-{digest}"


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
