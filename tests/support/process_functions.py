"""What tests run in processes of their own."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from resblock_bench.bench.gate import memory as check_memory
from resblock_bench.bench.gate.accuracy_cases import AccuracyCase, Errors
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.records import Cell, Memory
from resblock_bench.kernels import blocks
from resblock_bench.kernels.dispatch import Backend


def state(argument: bytes, channel: Channel) -> bytes:
    """Whether the process began warm and clean."""
    threads = Path("/proc/self/status").read_text().split("Threads:")[1].split()[0]
    warm = "resblock_bench.bench.measure.cell" in sys.modules
    return f"{warm} {torch.cuda.is_initialized()} {threads}".encode()


def die(argument: object) -> None:
    os._exit(1)


def leave() -> None:
    """As a package does that looks for a GPU when it is imported."""
    raise SystemExit(0)


def predict_or_crash(cell: Cell, backend: Backend) -> Memory | None:
    """The memory of a cell, unless all of it is recomputed."""
    if cell.checkpoint == "full":
        raise RuntimeError("boom")
    return check_memory.predict(cell, backend)


def predict_one_more(cell: Cell, backend: Backend) -> Memory | None:
    """The memory of a block that saves another activation: square keeps what it is given."""
    operator = blocks.group_norm_silu
    blocks.group_norm_silu = lambda *a, **k: operator(*a, **k).square()
    try:
        return check_memory.predict(cell, backend)
    finally:
        blocks.group_norm_silu = operator


def measure_naively(case: AccuracyCase) -> Errors:
    """The errors of kernels that lose digits; imported where they are interpreted."""
    from . import naive_kernels

    return naive_kernels.measure(case)


def host_time() -> Any:
    """A HostTime of few rounds."""
    from resblock_bench.bench.cost import host_time

    host_time.ROUNDS = host_time.WARMUP = 2
    return host_time.measure_host_time("bf16")
