"""The one place where a CPU and a GPU differ: timer, memory meter, backend flags, name."""

import functools
import os
from dataclasses import dataclass
from typing import Literal

import torch

from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.machine.nvml import process_bytes
from resblock_bench.bench.machine.proc import cpu_model

from .memory import CudaMeter, MemoryMeter, TrackerMeter
from .timing import CpuTimer, CudaTimer, Timer

Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Tools:
    """How a kind of device is timed: what the contract says without opening one."""

    timer: type[CpuTimer] | type[CudaTimer]
    backend: str


TOOLS: dict[Kind, Tools] = {
    "cpu": Tools(CpuTimer, "default"),
    "cuda": Tools(CudaTimer, "TF32 off, cudnn.benchmark on"),
}


@dataclass(frozen=True)
class Device:
    """What a measurement needs of the device it runs on."""

    kind: Kind
    torch_device: torch.device
    name: str
    uuid: str | None
    timer: Timer
    meter: MemoryMeter


def default_kind() -> Kind:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_kind(name: str) -> Kind:
    """The kind that a user names."""
    kinds: dict[str, Kind] = {"cpu": "cpu", "cuda": "cuda"}
    if name not in kinds:
        raise unknown("device", name, kinds)
    return kinds[name]


def open_device(kind: Kind, threads: int) -> Device:
    """Fix the process's threads and backend flags, and return the tools for this device.

    Raises UsageError for "cuda" where PyTorch sees no GPU.
    """
    torch.set_num_threads(threads)
    if kind == "cpu":
        name = cpu_model() or "CPU"
        return Device(kind, torch.device("cpu"), name, None, CpuTimer(), TrackerMeter())
    if not torch.cuda.is_available():
        raise UsageError(
            "device 'cuda' was asked for, but PyTorch sees no GPU: use --device cpu, or install a "
            "CUDA build of PyTorch and a driver"
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device())
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return Device(
        kind,
        device,
        torch.cuda.get_device_name(device),
        uuid,
        CudaTimer(device),
        CudaMeter(device, functools.partial(process_bytes, uuid, os.getpid())),
    )
