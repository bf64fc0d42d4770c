"""The traffic that a launch should have by its tier's rule, without counting it.

`norm_cost.count_traffic` runs the kernels and finds these numbers (a test holds them together); for
hundreds of published sites the rule is enough.
"""

from __future__ import annotations

from resblock_bench.bench.eager_chain import activation_bytes
from resblock_bench.bench.norm_cost import FLOOR, RULES, Direction, Norm, Traffic
from resblock_bench.kernels.tiers import Launch

_FP32 = 4


def expected_traffic(norm: Norm, direction: Direction, launch: Launch) -> Traffic:
    """Every read of the activation once in tier A, else twice; whole sectors."""
    floor = FLOOR[direction]
    again = 0 if launch.tier == "A" or direction == "rewrite" else floor - 1
    return Traffic(
        requested=floor + again,
        dram=floor + (again if launch.tier == "D" else 0),
        small=_small_bytes(norm, direction, launch) / activation_bytes(norm),
        floor=floor,
        sector_efficiency=1.0,
        rule="one read" if direction == "rewrite" else RULES[launch.tier],
    )


def _small_bytes(norm: Norm, direction: Direction, launch: Launch) -> float:
    """Of everything else: what modulates, statistics, partial sums, and the gradients' sums."""
    rows = float(norm.batch * norm.channels)
    halves = 2 * rows * (norm.modulation == "scale_shift")  # scale and shift, or their gradients
    added = norm.modulation == "add" or norm.bias_folded
    pre_shift = rows if norm.modulation == "add" else float(norm.channels * norm.bias_folded)
    affine = 2.0 * norm.channels
    moved = halves + pre_shift + affine + 2 * norm.batch * norm.groups
    sums = 2
    if direction == "backward":
        sums += added
        moved += sums * rows + halves + rows * added + affine
    partial = sums * launch.splits * rows
    if direction != "rewrite" and launch.tier in ("C", "D"):
        moved += partial
    if launch.tier == "D" and direction == "forward":
        moved += partial + pre_shift  # apply reads them from memory
    if launch.tier == "D" and direction == "backward":
        moved *= 2  # apply reads all of it once more, the last kernel the sums
    return _FP32 * moved
