"""The GPU as `tune` uses it: runs and times launches, and does not wait for one that hangs."""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError, first_line
from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.measure.timing import DEFAULT_RULE, CudaTimer, time_fn
from resblock_bench.bench.units import format_duration
from resblock_bench.kernels import dispatch
from resblock_bench.kernels.tiers import Launch, Machine

from .cases import Case, launched

# Within a bucket most of the time goes to compiling, 0.2 to 0.7 s a kernel.
TIMING = replace(
    DEFAULT_RULE,
    warmup_s=0.01,
    warmup_max_s=0.1,
    warmup_min_steps=3,
    burst_s=0.01,
    gap_s=0.002,
    rel_half_width=0.005,
    min_samples=20,
    max_samples=300,
    max_time_s=0.3,
)
# A launch that has not ended by then never will: the slowest takes a few ms.
HANG_S = 20.0


class DeviceLost(Exception):
    """The GPU can run nothing more in this process: a launch hangs, or broke the context."""


class Bench(Protocol):
    """What touches the GPU. arch: the name of its table.

    run       the results of a launch, once they are there
    time_us   the median time of a launch, L2 flushed before each
    give_up   end the process with this code after DeviceLost, and do not wait for the GPU

    run and time_us raise what the launch raises, or DeviceLost.
    """

    name: str
    arch: str
    machine: Machine
    device: torch.device

    def run(self, case: Case, how: Launch) -> Tensors: ...

    def time_us(self, case: Case, how: Launch) -> float: ...

    def give_up(self, code: int) -> int: ...


class QueuedTimer(CudaTimer):
    """CudaTimer with a flush that outlasts the queueing of a launch.

    What is then timed is the device alone, as where the host runs ahead. A flush of just L2 may end
    before the host has allocated and queued, and that would be timed, too.
    """

    FLUSHES = 16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._size = self.FLUSHES * torch.cuda.get_device_properties(device).L2_cache_size

    def sample_ms(self, step: Callable[[], object]) -> float:
        if self._buffer is None:
            self._buffer = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        return super().sample_ms(step)


class GpuBench:
    """The current CUDA device."""

    def __init__(self, device: torch.device, hang_s: float = HANG_S) -> None:
        machine, arch = dispatch._machine(device)
        assert arch is not None
        self.name = torch.cuda.get_device_name(device)
        self.arch, self.machine, self.device = arch, machine, device
        self._hang_s = hang_s
        self._timer = QueuedTimer(device)

    def run(self, case: Case, how: Launch) -> Tensors:
        with self._watched():
            results = launched(case, how)
            self._wait()
            return results

    def time_us(self, case: Case, how: Launch) -> float:
        with self._watched():
            timing = time_fn(lambda: launched(case, how), self._timer, TIMING)
            return statistics.median(timing.samples_ms) * 1e3

    def give_up(self, code: int) -> int:
        # An ordinary exit waits for the kernel that never ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _wait(self) -> None:
        """As synchronize, but for so long only."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        deadline = time.monotonic() + self._hang_s
        while not done.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                raise DeviceLost(f"did not end within {format_duration(self._hang_s)}")
            time.sleep(1e-4)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """A launch that is refused leaves the GPU as it was; an illegal access ends the context."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            try:
                torch.cuda.synchronize(self.device)
            except Exception:
                raise DeviceLost(f"broke the GPU's context ({first_line(error)})") from error
            raise


def open_gpu() -> GpuBench:
    """Raises UsageError where the kernels cannot be run."""
    if not torch.cuda.is_available():
        raise UsageError(
            "tune measures on a GPU, and PyTorch sees none: run it where there is one, with a CUDA "
            "build of PyTorch and a driver"
        )
    if not dispatch.triton_installed():
        raise UsageError("tune measures Triton kernels, and Triton is not installed: install it")
    if dispatch.interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, and tune measures compiled kernels: unset it")
    return GpuBench(torch.device("cuda", torch.cuda.current_device()))
