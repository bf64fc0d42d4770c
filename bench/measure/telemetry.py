"""The machine around a measurement: probes that read it, and what two readings say together."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import torch

from resblock_bench.bench.machine.nvml import NvmlError, NvmlGpu, session
from resblock_bench.bench.machine.proc import is_relative, read_cpu
from resblock_bench.bench.records import Count, NonNegative, Record


class Reading(Record, frozen=True, kw_only=True):
    """One moment: gauges, and counters that only grow; null where unknown.

    `t_s` is a monotonic clock's. `energy_j` and `throttled_us` count from the driver's start, the
    CPU seconds from the machine's (`busy`: neither idle nor stolen) or the process's (`own`: with
    the children that have ended). `foreign_processes` compute on the GPU and are neither this
    process nor its ancestors or descendants.
    """

    t_s: float
    sm_clock_mhz: NonNegative | None = None
    memory_clock_mhz: NonNegative | None = None
    temperature_c: float | None = None
    power_w: NonNegative | None = None
    energy_j: NonNegative | None = None
    throttled_us: dict[str, Count] | None = None
    foreign_processes: Count | None = None
    cpu_mhz: NonNegative | None = None
    busy_cpu_s: NonNegative | None = None
    own_cpu_s: NonNegative | None = None
    stolen_cpu_s: NonNegative | None = None
    notes: list[str] = msgspec.field(default_factory=list)


class Probe(Protocol):
    """Reads the machine in the process that computes. `source` says where from.

    `read` never raises: what fails becomes None and a note. `energy_j` is the device's counter
    alone, which is read often.
    """

    source: str

    def read(self) -> Reading: ...

    def energy_j(self) -> float | None: ...

    def close(self) -> None: ...


def open_probe(kind: Literal["cpu", "cuda"], uuid: str | None) -> Probe:
    """The probe for this device. `uuid` is the GPU's, with or without its prefix."""
    return CpuProbe() if kind == "cpu" else GpuProbe(uuid)


class CpuProbe:
    """The processor, from /proc and /sys below `root`."""

    source = "proc"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self) -> Reading:
        cpu = read_cpu(self._root)
        return Reading(
            t_s=time.monotonic(),
            cpu_mhz=cpu.mhz,
            busy_cpu_s=cpu.busy_s,
            own_cpu_s=cpu.own_s,
            stolen_cpu_s=cpu.stolen_s,
            notes=cpu.notes,
        )

    def energy_j(self) -> float | None:
        return None

    def close(self) -> None:
        pass


class GpuProbe:
    """One GPU from NVML, and the processor beside it."""

    source = "nvml, proc"

    def __init__(self, uuid: str | None, root: Path = Path("/")) -> None:
        self._root = root
        self._processor = CpuProbe(root)
        self._gpu: NvmlGpu | None = None
        self._failure = "the GPU's UUID is unknown"
        self._opened = ExitStack()
        if uuid is not None:
            try:
                self._opened.enter_context(session())
                self._gpu = NvmlGpu(uuid)
            except NvmlError as error:
                self._failure = f"NVML failed: {error}"

    def read(self) -> Reading:
        found = self._processor.read()
        if self._gpu is None:
            return msgspec.structs.replace(found, notes=[*found.notes, self._failure])
        questions = {
            "sm_clock_mhz": self._gpu.sm_clock_mhz,
            "memory_clock_mhz": self._gpu.memory_clock_mhz,
            "temperature_c": self._gpu.temperature_c,
            "power_w": self._gpu.power_w,
            "energy_j": self._gpu.energy_j,
            "throttled_us": self._gpu.throttled_us,
        }
        answers: dict[str, object] = {}
        failures: dict[str, list[str]] = {}
        for name, question in questions.items():
            try:
                answers[name] = question()
            except NvmlError as error:
                failures.setdefault(str(error), []).append(name)
        notes: list[str] = []
        try:
            answers["foreign_processes"], notes = self._foreign(self._gpu)
        except NvmlError as error:
            failures.setdefault(str(error), []).append("foreign_processes")
        notes += [f"NVML failed: {error} ({', '.join(names)})" for error, names in failures.items()]
        return msgspec.structs.replace(found, **answers, notes=[*found.notes, *notes])

    def energy_j(self) -> float | None:
        try:
            return None if self._gpu is None else self._gpu.energy_j()
        except NvmlError:
            return None

    def _foreign(self, gpu: NvmlGpu) -> tuple[int | None, list[str]]:
        listed = gpu.processes()
        if listed is None:
            return None, []
        computing = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if computing and os.getpid() not in listed:
            # In a container the driver may list host ids, where this process looks like another.
            return None, ["the driver does not list this process: others cannot be told from it"]
        return sum(not is_relative(pid, self._root) for pid in listed), []

    def close(self) -> None:
        self._gpu, self._failure = None, "the probe is closed"
        self._opened.close()
