"""A GPU by script: what is asked of torch.cuda and NVML is answered, tensors stay in main memory.

`installed` puts it in place in this process; with the folder on_a_scripted_gpu and this one on the
Python path every process has it. Code for a GPU then runs to its end where there is none, but for
the kernels: on what is a tensor of a CPU the operator is computed by ATen.

Whatever is called has to be called as PyTorch has it: a fake takes what the signature of the real
function takes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from torch.overrides import TorchFunctionMode

from .fake_nvml import FAILED, FakeGpu, FakeNvml, processes

UUID = "01234567-89ab-cdef-0123-456789abcdef"
NAME = "NVIDIA H100 80GB HBM3"
FAULTS = ("throttling", "foreign process", "NVML gone", "out of memory", "illegal access")
PROPERTIES = SimpleNamespace(
    name=NAME,
    uuid=UUID,
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=2**20,  # not 50 MiB, which a CPU takes long to write
    total_memory=80 * 2**30,
)
_GPU = torch.device("cuda", 0)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
_FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."


def _moved(given: Any) -> Any:
    """A device or its name, where a CPU has to do."""
    if isinstance(given, torch.device) and given.type == "cuda":
        return torch.device("cpu")
    if isinstance(given, str) and given.partition(":")[0] == "cuda":
        return "cpu"
    return given


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        named = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(_moved, args), **named)


class Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, _moved(torch.device(device)))


class Event:
    def __init__(self) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._seconds - self._seconds)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class CUDAGraph:
    def replay(self) -> None:
        time.sleep(1e-4)


@contextlib.contextmanager
def _nothing(*given: object, **named: object) -> Iterator[None]:
    yield


_fault = ""
_live = 2**28
"""Bytes that are always alive."""


def _wait(device: object = None) -> None:
    if _fault == "illegal access":
        raise RuntimeError(ILLEGAL)


def _peak(device: object = None) -> int:
    if _fault == "out of memory":
        raise torch.OutOfMemoryError(_FULL)
    return _live + 2**20


def _write(filename: str = "dump_snapshot.pickle") -> None:
    with open(filename, "wb") as file:
        file.write(b"snapshot")


def _like(real: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake that refuses what the real function would refuse."""
    signature = inspect.signature(real)

    def call(*given: Any, **named: Any) -> Any:
        signature.bind(*given, **named)
        return fake(*given, **named)

    return call


_FAKES: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": lambda device=None: PROPERTIES,
    "is_current_stream_capturing": lambda: False,
    "synchronize": _wait,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: _live,
    "max_memory_allocated": _peak,
    "max_memory_reserved": lambda device=None: _live + 2**21,
    "Event": lambda enable_timing=False, blocking=False, interprocess=False: Event(),
    "Stream": lambda device=None, priority=0: Stream(),
    "CUDAGraph": lambda keep_graph=False: CUDAGraph(),
    "current_stream": lambda device=None: Stream(),
    "stream": _nothing,
    "graph": _nothing,
    "memory._record_memory_history": lambda enabled="all", **options: None,
    "memory._dump_snapshot": _write,
}


class CountingGpu(FakeGpu):
    """Its energy grows with time, and under a fault what holds its clocks back."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        super().__init__(f"GPU-{UUID}", nvmlDeviceGetName=NAME)

    @property
    def answers(self) -> dict[str, Any]:
        passed = time.monotonic() - self._began
        self._answers["nvmlDeviceGetTotalEnergyConsumption"] = 1_000_000 + int(3e5 * passed)
        own = [os.getpid(), *([2**30] if _fault == "foreign process" else [])]
        self._answers["nvmlDeviceGetComputeRunningProcesses"] = processes(*own)
        if _fault == "throttling":
            held = SimpleNamespace(violationTime=int(1e9 * passed))
            policy = pynvml.NVML_PERF_POLICY_THERMAL
            self._answers["nvmlDeviceGetViolationStatus"] = {policy: held}
        return self._answers

    @answers.setter
    def answers(self, given: dict[str, Any]) -> None:
        self._answers = given


@contextlib.contextmanager
def installed(fault: str = "") -> Iterator[None]:
    """Within the block there is a GPU, with one of `FAULTS`."""
    global _fault
    assert not fault or fault in FAULTS, fault
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        for name, fake in _FAKES.items():
            place, _, last = f"torch.cuda.{name}".rpartition(".")
            real = getattr(sys.modules[place], last)
            patch.setattr(sys.modules[place], last, _like(real, fake))
        patch.setattr(torch, "Generator", Generator)
        # So that whoever else works here disturbs nothing.
        patch.setattr(os, "cpu_count", lambda: 16)
        gpu = CountingGpu()
        nvml = FakeNvml(gpu, init=FAILED if fault == "NVML gone" else None)
        patch.setitem(sys.modules, "pynvml", nvml)
        if "resblock_bench.bench.machine.nvml" in sys.modules:
            patch.setattr("resblock_bench.bench.machine.nvml.pynvml", nvml)
        _fault = fault
        try:
            yield
        finally:
            _fault = ""
