"""Implementations that go wrong, each in its own way; offered as an installed package would."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from pretended import pretend, quiet, throttled
from torch import Tensor, nn

from resblock_bench.bench.measure.implementations import IMPLEMENTATIONS
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.measure.timing import CpuTimer
from resblock_bench.bench.plugins import Cell, Implementation, block_arguments
from resblock_bench.reference import ResBlock

not_an_implementation = 3


def _around(description: str, around: Callable[[Tensor], Tensor]) -> Implementation:
    """The reference with something done to its output in each call."""

    def build(cell: Cell) -> nn.Module:
        return ResBlock(**block_arguments(cell), use_checkpoint=cell.checkpoint == "full")

    def wrap(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, emb: around(module(x, emb))

    return Implementation(description, build, wrap, unusable=lambda device: None)


def _raise(out: Tensor) -> Tensor:
    raise RuntimeError("illegal access [of memory]")


def _exhaust(out: Tensor) -> Tensor:
    # Written to, so that it is not merely promised by the kernel: 64 GiB.
    return out + torch.ones(2**34).sum()


def _hang(out: Tensor) -> Tensor:
    with contextlib.suppress(OSError):  # Linux: a test sees by its name that a process got here
        Path("/proc/self/comm").write_text("hanging")
    while True:
        time.sleep(60)


HANGING_BATCH = "RESBLOCK_BENCH_HANGING_BATCH"


def _hang_at_a_batch(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    if os.environ.get(HANGING_BATCH) == str(cell.batch):
        return lambda x, emb: _hang(module(x, emb))
    return module


def _print(out: Tensor) -> Tensor:
    print("spam " * 200_000, flush=True)
    print("the end of the spam", file=sys.stderr, flush=True)
    return out


def _segfault(out: Tensor) -> Tensor:
    ctypes.string_at(0)
    return out


def _kill(out: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return out


def _exit(out: Tensor) -> Tensor:
    print("leaving", flush=True)
    os._exit(7)


def _dawdle(out: Tensor) -> Tensor:
    time.sleep(0.02)
    return out


def _lag(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, emb: Tensor) -> Tensor:
        began = time.perf_counter()
        out: Tensor = module(x, emb)
        until = time.perf_counter() + 0.05 * (time.perf_counter() - began)
        while time.perf_counter() < until:
            pass
        return out

    return call


def _late(description: str, fault: Callable[[Tensor], Tensor]) -> Implementation:
    """Right in the check, in the memory phase and in the warm-up; then it goes wrong."""

    def wrap(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
        calls = itertools.count()

        def call(x: Tensor, emb: Tensor) -> Tensor:
            out: Tensor = module(x, emb)
            return fault(out) if next(calls) > 6 else out

        return call

    return replace(_around("", lambda out: out), description=description, wrap=wrap)


def _run_out(out: Tensor) -> Tensor:
    raise MemoryError("no more")


def _first(description: str) -> Implementation:
    """A clone of what it returned at first."""

    def wrap(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
        kept: list[Tensor] = []

        def call(x: Tensor, emb: Tensor) -> Tensor:
            if not kept:
                kept.append(module(x, emb))
            return kept[0].clone()

        return call

    return replace(_around("", lambda out: out), description=description, wrap=wrap)


def _slow_clock(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """A millisecond of ten is counted, by the very timer."""
    sample_ms = CpuTimer.sample_ms
    CpuTimer.sample_ms = lambda *a: sample_ms(*a) / 10  # type: ignore[method-assign]

    def call(x: Tensor, emb: Tensor) -> Tensor:
        time.sleep(0.02)
        out: Tensor = module(x, emb)
        return out

    return call


def _on(description: str, machine: Callable[[int], Reading]) -> Implementation:
    """The fused block, whose process reads another machine than this one."""

    def wrap(module: nn.Module, cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
        pretend(machine)
        return module

    return replace(IMPLEMENTATIONS["fused"], description=description, wrap=wrap)


wrong = _around("off by one per cent", lambda out: out * 1.01)
raising = _around("raises", _raise)
greedy = _around("wants 64 GiB", _exhaust)
hanging = _around("never returns", _hang)
printing = _around("prints a megabyte in each call", _print)
segfaulting = _around("reads address 0", _segfault)
killed = _around("ends by SIGKILL", _kill)
exiting = _around("ends its process with code 7", _exit)
slow = _around("sleeps 20 ms in each call", _dawdle)
twin = _around("the same", lambda out: out)
hanging_once = replace(
    twin, description="never returns for the batch that a variable names", wrap=_hang_at_a_batch
)
slower = replace(twin, description="spins for 5 % of its forward pass", wrap=_lag)
late_crash = _late("reads address 0 while it is timed", _segfault)
late_raise = _late("raises while it is timed", _raise)
late_oom = _late("runs out of memory while it is timed", _run_out)
late_hang = _late("never returns while it is timed", _hang)
cached = _first("returns what it returned at first")
slow_clock = replace(twin, description="counts a tenth of its time", wrap=_slow_clock)
undisturbed = _on("on a machine that does nothing else", quiet)
undisturbed_slower = replace(
    undisturbed,
    description="spins for 5 % of its forward pass on such a machine",
    wrap=lambda module, cell: _lag(undisturbed.wrap(module, cell), cell),
)
overheated = _on("on a machine that throttles", throttled)
