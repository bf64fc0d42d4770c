"""A driver for Triton whose launch does nothing: what runs up to it can be run without a GPU.

With it in place of CUDA's, compiled kernels are launched on tensors in the host's memory, which
stand for a GPU's. Kernels are compiled for sm_90 as ever; then what would be sent to the GPU is
dropped, or kept in `IdleDriver.received`. No result is computed: outputs hold what memory held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from resblock_bench.kernels.dispatch import standing_for_gpu

SHARED_BYTES = 227 * 1024  # what a block may have on sm_90
_functions = itertools.count(1)
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


class Received(NamedTuple):
    """One launch as the driver got it.

    function: which compiled kernel. options: its warps and shared memory as Triton packs them.
    arguments: of the kernel, in order, constexprs among them where this Triton passes them.
    """

    grid: tuple[int, int, int]
    stream: int
    function: int
    options: Any
    arguments: tuple[Any, ...]


class IdleDriver:
    """What Triton asks of a driver. `device` and `stream` are the current ones."""

    def __init__(self, *, keep: bool) -> None:
        self.device = -1  # what a tensor on the CPU says it is on
        self.stream = 0
        self.received: list[Received] = []
        self.keep = keep
        self.utils = self
        self.launcher_cls = _launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, *binary: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and, from 3.4 on, the most threads of a block."""
        function = next(_functions)
        return (1, function, 0, 0) if _VERSION < (3, 4) else (1, function, 0, 0, 1024)

    def unload_module(self, module: int) -> None:
        pass


def _launcher(source: Any, metadata: Any) -> Any:
    """Made once for a compiled kernel, which Triton keeps: asks for the driver of the day."""

    def launch(*sent: Any) -> None:
        idle = driver.active
        if not idle.keep:
            return
        x, y, z, stream, function, options, about, enter, leave, *arguments = sent
        for hook in (enter, leave):
            if hook is not None:
                hook(about)
        idle.received.append(Received((x, y, z), stream, function, options, tuple(arguments)))

    return launch


@contextmanager
def idle_driver(*, keep: bool = False) -> Iterator[IdleDriver]:
    """Within the block Triton has this driver, and takes tensors on the CPU for a GPU's.

    Only in a process whose kernels are compiled: TRITON_INTERPRET is not 1.
    """
    idle = IdleDriver(keep=keep)
    before = dict(vars(driver))  # asking for the driver would start CUDA's, here absent
    driver.set_active(idle)
    try:
        with standing_for_gpu():
            yield idle
    finally:
        vars(driver).update(before)
