"""The least that a step must do, and how long the machine's ceilings need for it.

    bytes   every input read once and every result written once, with cold caches

            inference, forward   x, emb and the parameters; out
            train                also the cotangent; the gradients of x, emb and the parameters

    flops   of the reference without checkpointing: its convolutions and linears, forward and, in
            train mode, backward; two operations a multiply-add

Both are the same for every variant of a site. The times are bytes over the bandwidth of a large
copy, and flops over the rate of a matrix product in the cell's dtype. A share near 1 is as good as
it gets; above 1 is no error: Winograd and Fourier convolutions need fewer operations than are
counted, and on a CPU a small site stays in the cache.
"""

import functools
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.records import Ceilings, Cell, Floor, site_of
from resblock_bench.bench.units import format_bytes

from .workload import Workload, draw_inputs, draw_weights

TOLERANCE = 1.25
"""How far a true time may lie beyond the byte ceiling: that is measured, so a little low, and by
copies, while a step mostly reads."""


class LeastWork(NamedTuple):
    """What a step must do at least."""

    bytes: int
    flops: int


def floor_of(cell: Cell, ceilings: Ceilings, median_ms: float | None) -> Floor:
    """The floor of a supported cell; `share` is None without a median."""
    work = _work(site_of(cell))
    bytes_ms = work.bytes / ceilings.copy_bytes_per_s * 1e3
    flops_ms = work.flops / ceilings.matrix_flops_per_s[cell.dtype] * 1e3
    return Floor(
        bytes=work.bytes,
        flops=work.flops,
        bytes_ms=bytes_ms,
        flops_ms=flops_ms,
        share=None if median_ms is None else max(bytes_ms, flops_ms) / median_ms,
    )


def impossible(floor: Floor, ceilings: Ceilings, fastest_ms: float) -> str | None:
    """Why a step cannot have been this fast, or None.

    Only bytes decide, at the best rate of any copy, caches included, and with TOLERANCE.
    """
    needed_ms = floor.bytes / ceilings.peak_bytes_per_s * 1e3
    if fastest_ms >= needed_ms / TOLERANCE:
        return None
    return (
        f"a step took {fastest_ms:.3g} ms, but only to read its inputs and to write its results "
        f"({format_bytes(floor.bytes)}) this machine needs {needed_ms:.3g} ms at its fastest: "
        "the step left work out, or the clock is wrong"
    )


@functools.cache
def _work(site: Cell) -> LeastWork:
    # Here and not above: it imports Triton, 70 MB that only the process of a cell needs.
    from torch.utils.flop_counter import FlopCounterMode

    cpu = torch.device("cpu")
    with FakeTensorMode():
        workload = Workload(site, draw_weights(site, 0), draw_inputs(site, cpu, 0), cpu)
        with FlopCounterMode(display=False) as counter:
            out = workload.step()
        read = [workload.x, workload.emb, *workload.block.parameters()]
        written = [out]
        if site.mode == "train":
            written += read  # their gradients
            read = [*read, workload.cotangent]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in [*read, *written])
    return LeastWork(moved, counter.get_total_flops())
