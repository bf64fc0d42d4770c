"""The memory part of `check`: what a training step holds, exact to the byte and without running it.

A subject is a published model, an entry one of its blocks in one implementation and checkpoint
mode. The figures are those of `predict`: live tensors of the CPU's operators on fake tensors. They
are the same on every machine, but follow what PyTorch's operators save and allocate, so pins hold
for one minor version of it.
"""

import gc
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console

from resblock_bench.bench.axes import Selection
from resblock_bench.bench.findings import Finding
from resblock_bench.bench.grid import plan
from resblock_bench.bench.pins import Found, PinnedPart, Rule
from resblock_bench.bench.predict import predict_memory
from resblock_bench.bench.progress import task_progress
from resblock_bench.bench.records import Cell, cell_name

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


def measure_cells(wanted: Sequence[Cell], console: Console) -> Found:
    """The figures of the cells."""
    found = Found()
    try:
        with task_progress(console, "memory on fake tensors", len(wanted)) as advance:
            for cell in wanted:
                # A prediction collects garbage several times; it need not walk half a million
                # objects of PyTorch, which imports much of itself in the first one.
                gc.freeze()
                _measure(found, cell)
                advance()
    finally:
        gc.unfreeze()
    return found


def _measure(found: Found, cell: Cell) -> None:
    subject, entry = str(cell.model), cell_name(cell).removeprefix(f"{cell.model} ")
    try:
        memory = predict_memory(cell)
        problem = None if memory else "no prediction can be made of it"
    except Exception as error:
        memory, problem = None, f"crashed: {type(error).__name__}: {error}"
    if memory is None:
        finding = Finding(
            part=NAME, level="invalid", subject=subject, entry=entry, text=str(problem)
        )
        found.findings.append(finding)
        return
    found.subjects.setdefault(subject, {})[entry] = {
        "peak_above_baseline_bytes": memory.peak_above_baseline_bytes,
        "saved_for_backward_bytes": memory.saved_for_backward_bytes,
    }


def _made_with() -> dict[str, str | None]:
    return {"torch": ".".join(torch.__version__.split(".")[:2])}


PART = PinnedPart(
    name=NAME,
    cannot=lambda: None,
    measure=lambda console: measure_cells(list(cells()), console),
    rules=dict.fromkeys(("peak_above_baseline_bytes", "saved_for_backward_bytes"), Rule("lower")),
    made_with=_made_with,
)
