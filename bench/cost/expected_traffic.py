"""The traffic that a launch should have by its tier's rule, without counting it.

`norms.count_traffic` runs the kernels and finds these numbers (a test holds them together); for
hundreds of published sites the rule is enough.
"""

from __future__ import annotations

from resblock_bench.bench.compiled import traffic
from resblock_bench.bench.compiled.norms import LEAST_PASSES, RULES, Direction, Norm, Traffic
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.kernels.tiers import Launch, ceil_div

from .eager_chain import activation_bytes

_FP32 = 4


def expected_traffic(norm: Norm, direction: Direction, launch: Launch) -> Traffic:
    """Every read of the activation once in tier A, else twice; whole sectors where rows are."""
    floor = LEAST_PASSES[direction]
    again = 0 if launch.tier == "A" or direction == "rewrite" else floor - 1
    return Traffic(
        requested=floor + again,
        dram=floor + (again if launch.tier == "D" else 0),
        small=_small_bytes(norm, direction, launch) / activation_bytes(norm),
        floor=floor,
        sector_efficiency=_sector_efficiency(norm, launch),
        rule="one read" if direction == "rewrite" else RULES[launch.tier],
    )


def _sector_efficiency(norm: Norm, launch: Launch) -> float:
    """Of rows of a slab that begin anywhere between sectors, and of channels in NCHW."""
    size, sector = DTYPES[norm.dtype].itemsize, traffic.SECTOR_BYTES
    if norm.layout == "nhwc":
        row, count = launch.slab * size, max(1, norm.channels // launch.slab)
    else:
        row, count = launch.slab * norm.positions * size, norm.groups
    touched = sum(ceil_div((i + 1) * row, sector) - i * row // sector for i in range(count))
    return count * row / (touched * sector)


def _small_bytes(norm: Norm, direction: Direction, launch: Launch) -> float:
    """Of everything else: what modulates, statistics, partial sums, and the gradients' sums."""
    rows = float(norm.batch * norm.channels)
    halves = 2 * rows * (norm.modulation == "scale_shift")  # scale and shift, or their gradients
    added = norm.modulation == "add" or norm.bias_folded
    pre_shift = rows if norm.modulation == "add" else float(norm.channels * norm.bias_folded)
    affine = 2.0 * norm.channels
    moved = halves + pre_shift + affine + 2 * norm.batch * norm.groups
    units = float(norm.batch * ceil_div(norm.channels, launch.slab))
    if direction == "backward":
        moved += units  # counters, and below
        moved += 2 * rows + halves + rows * added + affine
    if launch.split and direction != "rewrite":
        moved += units
        moved += 2 * norm.batch * norm.groups * launch.parts  # of the parts, for each group
        if direction == "backward":
            moved += 2 * norm.batch * norm.groups + (2 + added) * launch.splits * rows
    return _FP32 * moved
