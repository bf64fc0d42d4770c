"""The least that a step must do, and how long the machine's ceilings need for it.

    bytes   every input read once and every result written once, with cold caches

            inference, forward   x, emb and the parameters; out
            train                also the cotangent; the gradients of x, emb and the parameters
            train of a model     inputs; the weights, AdamW's moments and the moving average, which
                                 are read and written

    flops   of the reference without checkpointing: its convolutions, linears and matrix products,
            forward and, in train mode, backward; two operations a multiply-add

Both are the same for every variant of a site. The times are bytes over the bandwidth of a large
copy, and flops over the rate of a matrix product in the cell's dtype. The latter over the median is
the share of the matrix rate, which of a model is called MFU. A share near 1 is as good as
it gets. A little above is no error: Winograd's convolutions need fewer operations than are counted,
and on a CPU a small site stays in the cache. Far above is `impossible`.
"""

import functools
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.records import Ceilings, Cell, Floor, Row, site_of
from resblock_bench.bench.units import format_bytes

from .models import least_model_work
from .workload import Workload, draw_inputs, draw_weights

TOLERANCE = 1.25
"""How far a true time may lie beyond the byte ceiling: that is measured, so a little low, and by
copies, while a step mostly reads."""
FEWER_OPERATIONS = 4.0
"""Winograd's F(4×4, 3×3) multiplies so many times less often than the direct convolution (Lavin and
Gray 2016); no library that PyTorch uses has a form that saves more."""


class LeastWork(NamedTuple):
    """What a step must do at least."""

    bytes: int
    flops: int


def floor_of(cell: Cell, ceilings: Ceilings, median_ms: float | None) -> Floor:
    """The floor of a supported cell; `share` is None without a median."""
    work = _work(site_of(cell))
    return _timed(work.bytes, work.flops, cell, ceilings, median_ms)


def _timed(
    bytes_: int, flops: int, cell: Cell, ceilings: Ceilings, median_ms: float | None
) -> Floor:
    bytes_ms = bytes_ / ceilings.copy_bytes_per_s * 1e3
    flops_ms = flops / ceilings.matrix_flops_per_s[cell.dtype] * 1e3
    return Floor(
        bytes=bytes_,
        flops=flops,
        bytes_ms=bytes_ms,
        flops_ms=flops_ms,
        share=None if median_ms is None else max(bytes_ms, flops_ms) / median_ms,
    )


def matrix_share(row: Row) -> float | None:
    """The share of the matrix rate that a measured step reaches (MFU); None where it is unknown."""
    if row.floor is None or row.median_ms is None:
        return None
    return row.floor.flops_ms / row.median_ms


def judged(row: Row, ceilings: Ceilings) -> Row:
    """A row held against ceilings: with its floor by these, and maybe `impossible`."""
    if row.status != "ok" or row.floor is None or row.median_ms is None or row.samples_ms is None:
        return row
    floor = _timed(row.floor.bytes, row.floor.flops, row.axes, ceilings, row.median_ms)
    reason = impossible(floor, ceilings, row.median_ms, min(row.samples_ms))
    if reason is None:
        return replace(row, floor=floor)
    return replace(row, floor=floor, status="impossible", reason=reason)


def impossible(floor: Floor, ceilings: Ceilings, median_ms: float, fastest_ms: float) -> str | None:
    """Why a step cannot have been this fast, or None.

    By its bytes at the best rate of any copy, caches included, with TOLERANCE; by its operations
    with FEWER_OPERATIONS.
    """
    cause = "the step left work out, or the clock is wrong"
    needed_ms = floor.bytes / ceilings.peak_bytes_per_s * 1e3
    if fastest_ms < needed_ms / TOLERANCE:
        return (
            f"a step took {fastest_ms:.3g} ms, but only to read its inputs and to write its "
            f"results ({format_bytes(floor.bytes)}) this machine needs {needed_ms:.3g} ms at its "
            f"fastest: {cause}"
        )
    if median_ms < floor.flops_ms / FEWER_OPERATIONS / TOLERANCE:
        return (
            f"a step took {median_ms:.3g} ms, but for the {floor.flops:.3g} operations of its "
            f"convolutions this machine needs {floor.flops_ms:.3g} ms, and "
            f"{FEWER_OPERATIONS:g} times less at its fastest: {cause}"
        )
    return None


@functools.cache
def _work(site: Cell) -> LeastWork:
    if site.workload != "block":
        return LeastWork(*least_model_work(site))
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
