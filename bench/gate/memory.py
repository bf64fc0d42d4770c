"""The memory part of `check`: what a training step holds, exact to the byte and without running it.

A subject is a published model, an entry one of its blocks in one implementation and checkpoint
mode; the fused block is there on both of its paths, PyTorch's own kernels and the Triton kernels,
which it takes on a GPU. The figures are those of `predict`: live tensors on fake tensors, without a
GPU library's workspaces. They are the same on every machine, but follow what PyTorch's operators
save and allocate, so pins hold for one minor version of it.
"""

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from resblock_bench.bench.checkout import in_checkout
from resblock_bench.bench.findings.findings import Finding
from resblock_bench.bench.grid.axes import Selection
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.machine.answers import answers
from resblock_bench.bench.machine.workers import Job, JobFailed
from resblock_bench.bench.measure.predict_memory import predict_memory
from resblock_bench.bench.records import Cell, Memory, cell_name
from resblock_bench.kernels.dispatch import Backend, prefer, triton_installed

from .pins import Criterion, Found, PinnedPart

NAME = "memory"

_VARIANTS: Selection = {
    "mode": ("train",),
    "impl": ("reference", "fused"),
    "checkpoint": ("none", "selective", "full"),
}
_SITES: tuple[Selection, ...] = (
    # Dropout, scale and shift, on a concatenated skip.
    {
        "model": ("iddpm-cifar10-uncond",),
        "resolution": (32,),
        "channels": (256,),
        "out_channels": (128,),
        "batch": (4,),
    },
    # An add before the norm.
    {
        "model": ("iddpm-lsun256-bedroom",),
        "resolution": (64,),
        "channels": (256,),
        "out_channels": (256,),
        "dtype": ("fp32", "bf16"),
        "batch": (2,),
    },
    # Plain, up and down, channels-last in 16 bits.
    {
        "model": ("adm-imagenet64-cond",),
        "resolution": (32,),
        "channels": (384,),
        "out_channels": (384,),
        "dtype": ("bf16",),
        "layout": ("nhwc",),
        "batch": (2,),
    },
)


def cells() -> Iterator[Cell]:
    """All cells, in order."""
    for site in _SITES:
        yield from (item.cell for item in plan([{**site, **_VARIANTS}]))


def items(wanted: Iterable[Cell]) -> Iterator[tuple[Cell, Backend]]:
    """Each cell on each of its paths."""
    for cell in wanted:
        yield cell, "aten"
        if cell.impl == "fused":
            yield cell, "triton"


def measure_cells(wanted: Iterable[Cell], console: Console) -> Found:
    """The figures of the cells, measured in processes of their own."""
    found = Found()
    jobs = [Job(True, predict, item) for item in items(wanted)]
    values = dict(answers(jobs, console, "memory on fake tensors"))
    # Entries stand in the order of the cells, in which the jobs do not end.
    for job in jobs:
        cell, backend = job.arguments
        try:
            enter(found, cell, backend, values[job].get())
        except JobFailed as error:
            _say(found, cell, backend, f"crashed: {error}")
    return found


def predict(cell: Cell, backend: Backend) -> Memory | None:
    """The memory of a cell on one path. That of Triton needs TRITON_INTERPRET=1, and runs nothing:
    on fake tensors the operators only allocate."""
    # A prediction collects garbage several times; it need not walk half a million objects of
    # PyTorch, which imports much of itself in the first one.
    gc.freeze()
    with prefer(backend):
        return predict_memory(cell)


def enter(found: Found, cell: Cell, backend: Backend, memory: Memory | None) -> None:
    """Add a cell's figures, or that there are none."""
    if memory is None:
        _say(found, cell, backend, "no prediction can be made of it")
        return
    found.subjects.setdefault(str(cell.model), {})[entry_of(cell, backend)] = {
        "peak_above_baseline_bytes": memory.peak_above_baseline_bytes,
        "saved_for_backward_bytes": memory.saved_for_backward_bytes,
    }


def entry_of(cell: Cell, backend: Backend) -> str:
    """The cell's name without the model, and the path that is not the CPU's."""
    name = cell_name(cell).removeprefix(f"{cell.model} ")
    return f"{name} in Triton" if backend == "triton" else name


def _say(found: Found, cell: Cell, backend: Backend, text: str) -> None:
    entry = entry_of(cell, backend)
    found.findings.append(Finding(NAME, "invalid", str(cell.model), entry, text))


def _cannot() -> str | None:
    if not in_checkout(Path.cwd()):
        return "it is about this project's blocks: run it in a checkout of resblock-bench"
    return None if triton_installed() else "Triton, whose path it measures too, is not installed"


def _made_with() -> dict[str, str | None]:
    return {"torch": ".".join(torch.__version__.split(".")[:2])}


PART = PinnedPart(
    name=NAME,
    cannot=_cannot,
    measure=lambda console: measure_cells(list(cells()), console),
    criteria=dict.fromkeys(
        ("peak_above_baseline_bytes", "saved_for_backward_bytes"), Criterion("lower")
    ),
    made_with=_made_with,
)
