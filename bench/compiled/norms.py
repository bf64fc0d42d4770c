"""What one call of the fused operator costs on a GPU that is not there: bytes, and machine code.

Two functions that run in processes of their own, since Triton's kernels are either interpreted or
compiled: `count_traffic` needs TRITON_INTERPRET=1 when this module is imported, `compile_kernel`
must not have it. Both take the launch that the kernels' own rules choose for a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from resblock_bench.bench.grid.grid import GROUPS
from resblock_bench.bench.measure.workload import DTYPES, norm_shapes
from resblock_bench.bench.records import Cell, DType, Layout, Record
from resblock_bench.kernels import launch as launches
from resblock_bench.kernels.spec import Modulation, Spec
from resblock_bench.kernels.tiers import (
    Launch,
    Machine,
    Problem,
    Tier,
    ceil_div,
    plan_launch,
    rewrite_launch,
)

from . import traffic
from .machine_code import KernelCode, compile_for

Direction = Literal["forward", "rewrite", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "rewrite", "backward")
LEAST_PASSES: dict[Direction, int] = {"forward": 2, "rewrite": 2, "backward": 3}
"""Passes over the activation that cannot be avoided: read x, write y; read x and dy, write dx."""

MACHINES = {
    80: Machine(sms=108, l2_bytes=40 * 2**20),
    90: Machine(sms=132, l2_bytes=50 * 2**20),
    100: Machine(sms=148, l2_bytes=126 * 2**20),
}
"""A100, H100 SXM and B200; multiprocessors and L2 as NVIDIA's architecture papers state them."""

_ACTIVATIONS = ("p_x", "p_y", "p_dy", "p_dx")
_COUNTED_ELEMENTS = 2**17
_COUNTED_UNITS = 2
_COUNTED_SPLITS = 16


class Norm(Record, frozen=True, kw_only=True):
    """One norm of a block: its activation (N, C, HW), and what modulates it.

    modulation: "none", "scale_shift", or "add" for the pre-norm add alone. bias_folded: the bias of
    the convolution before it is in the pre-norm add, as in the fused block on a GPU.
    """

    batch: int
    channels: int
    positions: int
    groups: int
    dtype: DType
    layout: Layout
    modulation: Literal["none", "scale_shift", "add"]
    bias_folded: bool
    dropout: float

    @property
    def problem(self) -> Problem:
        size = DTYPES[self.dtype].itemsize
        nhwc = self.layout == "nhwc"
        return Problem(self.batch, self.channels, self.positions, self.groups, nhwc, size)


def norms_of_block(
    cell: Cell, groups: Callable[[int], int] = lambda channels: GROUPS
) -> tuple[Norm, Norm]:
    """Both as the fused block runs them on a GPU: conv1's bias is in the add before the second.

    groups: of a norm over so many channels
    """

    def norm(shape: tuple[int, int], **how: Any) -> Norm:
        channels, positions = shape
        return Norm(
            batch=cell.batch,
            channels=channels,
            positions=positions,
            groups=groups(channels),
            dtype=cell.dtype,
            layout=cell.layout,
            **how,
        )

    first, second = norm_shapes(cell)
    return (
        norm(first, modulation="none", bias_folded=False, dropout=0.0),
        norm(second, modulation=cell.conditioning, bias_folded=True, dropout=cell.dropout),
    )


class Traffic(Record, frozen=True, kw_only=True):
    """Global memory of all launches of one direction, in passes over the activation (N·C·HW).

    requested: what the programs ask for, second reads included. dram: what of it is expected from
    memory rather than L2, by the tier's rule; small: likewise, of everything that is not an
    activation (modulation, statistics, partial sums, counters). sector_efficiency: bytes asked for
    over those of the 32-byte sectors they lie in, of the activations.
    """

    requested: float
    dram: float
    small: float
    floor: int
    sector_efficiency: float
    rule: str


RULES: dict[Tier, str] = {
    "A": "nothing is read twice",
    "B": "the second read of a unit comes from L2",
    "C": "the second read of a part comes from L2",
    "D": "the second read comes from memory",
}


def launch_of(norm: Norm, direction: Direction, arch: int, tier: Tier | None) -> Launch:
    """What the kernels' rules choose on this architecture. ValueError where `tier` cannot hold."""
    if direction == "rewrite":
        return rewrite_launch(norm.problem, MACHINES[arch])
    return plan_launch(direction, norm.problem, MACHINES[arch], tier)


def count_traffic(norm: Norm, direction: Direction, launch: Launch) -> Traffic:
    """Counted by running the launches in Triton's interpreter on two units of one sample.

    Where a program would loop over many tiles the units are shortened to a tile or two a program:
    what is touched of activations is proportional to their positions, and of everything else to
    the number of programs, which is kept. Where that is large, it follows from two smaller ones.
    """
    if launch.splits <= 2 * _COUNTED_SPLITS:
        return _counted(norm, direction, launch)
    fewer, more = (
        _counted(norm, direction, launch._replace(splits=splits))
        for splits in (_COUNTED_SPLITS, 2 * _COUNTED_SPLITS)
    )
    a_split = (more.small - fewer.small) / _COUNTED_SPLITS
    small = fewer.small + a_split * (launch.splits - _COUNTED_SPLITS)
    return msgspec.structs.replace(more, small=small)


def _counted(norm: Norm, direction: Direction, launch: Launch) -> Traffic:
    CG = norm.channels // norm.groups
    C = min(norm.channels, _COUNTED_UNITS * launch.slab)
    units = ceil_div(C, launch.slab)
    short, HW = _shortened(launch, norm.positions)
    short = short._replace(lag=min(short.lag, units * short.parts))
    small_norm = msgspec.structs.replace(norm, batch=1, channels=C, positions=HW, groups=C // CG)
    with traffic.counting() as counter:
        _run(small_norm, direction, short, "cpu")

    elements, element_size = C * HW, DTYPES[norm.dtype].itemsize
    reads = [a for a in counter.accesses() if a.direction == "read"]
    writes = [a for a in counter.accesses() if a.direction == "write"]
    written = {a.tensor for a in writes}
    activations = [a for a in reads + writes if a.tensor in _ACTIVATIONS]
    requested = sum(a.requested_bytes for a in activations)
    sectors = sum(a.sectors for a in activations)
    if launch.tier == "D" and direction != "rewrite":
        dram = requested
    else:
        dram = sum(a.distinct_bytes for a in activations)
    # What the launch wrote itself, it finds in L2.
    small = sum(
        _share(a, norm) * a.distinct_bytes
        for a in reads + writes
        if a.tensor not in _ACTIVATIONS and not (a.direction == "read" and a.tensor in written)
    )
    activation_bytes = element_size * elements
    return Traffic(
        requested=requested / activation_bytes,
        dram=dram / activation_bytes,
        # Of a unit whose positions were not shortened.
        small=small / (element_size * C * norm.positions),
        floor=LEAST_PASSES[direction],
        sector_efficiency=requested / (sectors * traffic.SECTOR_BYTES),
        rule="one read" if direction == "rewrite" else RULES[launch.tier],
    )


def counted_launch(launch: Launch) -> Launch:
    """The launch as far as traffic goes: equal ones are counted alike."""
    return launch._replace(reason="", lag=min(launch.lag, _COUNTED_UNITS * launch.parts))


def kernels_of(
    norm: Norm, direction: Direction, launch: Launch
) -> dict[str, list[launches.Recorded]]:
    """The launches of every kernel of the direction, by its name and phase; none is made."""
    with launches.recording() as recorded:
        _run(norm, direction, launch, "meta")
    kinds: dict[str, list[launches.Recorded]] = {}
    for item in recorded:
        phase = item.arguments.get("PHASE")
        name = item.kernel.__name__.removesuffix("_kernel")
        kinds.setdefault(f"{name}: {phase}" if phase else name, []).append(item)
    return kinds


def compile_kernel(
    norm: Norm, direction: Direction, launch: Launch, arch: int, kernel: str
) -> KernelCode:
    """One of `kernels_of`, compiled for the launch at the norm's full size."""
    items = kernels_of(norm, direction, launch)[kernel]
    return KernelCode(
        kernel=kernel,
        launches=len(items),
        programs=sum(item.grid[0] for item in items),
        code=compile_for(items[0].kernel, items[0].arguments, arch),
    )


def _share(access: traffic.Access, norm: Norm) -> float:
    """What one sample is charged of a tensor that all samples share."""
    shared = access.tensor in ("p_weight", "p_bias", "p_dweight", "p_dbias", "p_seed") or (
        access.tensor == "p_pre" and norm.modulation != "add"
    )
    return 1 / norm.batch if shared else 1.0


def _shortened(launch: Launch, HW: int) -> tuple[Launch, int]:
    """A launch over fewer positions: as many programs, of a tile or two each."""
    divided = launch.splits * launch.chunk < HW  # into fewer parts than it is launched with
    if not divided and (launch.slab * HW <= _COUNTED_ELEMENTS or launch.tiles <= 2):
        return launch, HW
    # One tile where many programs share a unit: the interpreter takes 20 ms for each.
    tiles = 2 if launch.splits <= 8 else 1
    last = HW % launch.block_hw or launch.block_hw  # of the last tile, where tiles do not fit
    positions = (launch.splits * tiles - 1) * launch.block_hw + last
    return launch._replace(tiles=tiles), positions


def _run(norm: Norm, direction: Direction, launch: Launch, device: str) -> None:
    dtype = DTYPES[norm.dtype]
    N, C, HW = norm.batch, norm.channels, norm.positions

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    # Two spatial dimensions, since one has no channels-last layout.
    side = math.isqrt(HW)
    sizes = (side, side) if side * side == HW else (HW, 1)
    x = empty(N, C, *sizes, dtype=dtype)
    if norm.layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = empty(N, 2 * C).chunk(2, dim=1)
    pre_shift = None
    if norm.modulation == "add":
        pre_shift = empty(N, C)
    elif norm.bias_folded:
        pre_shift = empty(C).expand(N, -1)
    modulated = norm.modulation == "scale_shift"
    modulation = Modulation(
        empty(C), empty(C), scale if modulated else None, shift if modulated else None, pre_shift
    )
    seed = empty(dtype=torch.int64) if norm.dropout else None
    spec = Spec(norm.groups, 1e-5, True, norm.dropout, dtype)
    mean = empty(N, norm.groups)
    rstd = torch.ones_like(mean)
    if direction == "forward":
        launches.forward(x, modulation, seed, spec, launch)
    elif direction == "rewrite":
        launches.rewrite(x, mean, rstd, modulation, seed, spec, launch)
    else:
        dy = torch.ones_like(x)
        launches.backward(dy, x, mean, rstd, modulation, seed, spec, launch)
