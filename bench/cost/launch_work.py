"""The work of the fused kernels' launches, from what is known of them without a GPU.

From the norm's sizes, the launch, the counted bytes and the compiled kernel: what `predict_time`
takes. The bytes of a direction belong to its one launch; where units are divided, half of its
programs sum, and read from memory, and half write, and read again from L2.

Instructions are those of the kernel's main loops for an element (`MachineCode.loops`), padded lanes
included. Round trips before the first load of the activation, and what a program has in flight, are
read off the kernels' source (ROUND_TRIPS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from resblock_bench.bench.compiled.machine_code import KernelCode
from resblock_bench.bench.compiled.norms import LEAST_PASSES, Direction, Norm, Traffic
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.kernels.tiers import Launch, ceil_div

from .eager_chain import activation_bytes
from .predict_time import LaunchWork, Part

ROUND_TRIPS = {
    "resident": 1.0,
    "whole": 1.0,
    "rewrite": 2.0,
    "split sums": 2.0,
    "split apply": 4.0,
}
"""Loads that wait for each other before a program's first load of an activation.

resident, whole   modulation and statistics, at once
rewrite           modulation or statistics; then what depends on statistics
split             a ticket first; apply also waits for its unit's flag after it: an arrival, a fold
                  and a flag seen, of which the lag between sums and output hides the rest
"""


class Moved(NamedTuple):
    """Bytes read from memory, written to it, and read from L2."""

    read: float
    written: float
    l2: float


def launch_work(
    norm: Norm,
    direction: Direction,
    launch: Launch,
    traffic: Traffic,
    kernels: Sequence[KernelCode],
) -> list[LaunchWork]:
    """The direction's launches in the order of `kernels`, which are what it was compiled to."""
    return [_work(norm, direction, launch, traffic, kernel) for kernel in kernels]


def _work(
    norm: Norm, direction: Direction, launch: Launch, traffic: Traffic, kernel: KernelCode
) -> LaunchWork:
    tile = launch.block_c * launch.block_hw
    tensors = 1 if direction != "backward" else 2
    in_flight = tile * tensors * DTYPES[norm.dtype].itemsize / traffic.sector_efficiency
    if launch.split and direction == "backward" and norm.layout == "nhwc":
        in_flight *= min(2, launch.tiles)  # it loads a tile ahead
    # Lanes past the end of a group load nothing and execute everything.
    useful = min(1.0, launch.slab / (ceil_div(launch.slab, launch.block_c) * launch.block_c))
    useful *= min(1.0, norm.positions / (launch.splits * launch.chunk))

    def part(phase: str, programs: int, moved: Moved, loops: Sequence[dict[str, float]]) -> Part:
        elements = float(programs) * launch.tiles * tile
        return Part(
            programs=programs,
            read_bytes=moved.read,
            written_bytes=moved.written,
            l2_bytes=moved.l2,
            in_flight_bytes=in_flight * useful,
            round_trips=ROUND_TRIPS[phase],
            instructions=elements * sum(loop["total"] for loop in loops),
            special=elements * sum(loop["mufu"] for loop in loops),
        )

    code, programs = kernel.code, kernel.programs // kernel.launches
    first, rest = _bytes(norm, direction, traffic)
    phase = kernel.kernel.rpartition(": ")[2]  # such as "split" of "backward: split"
    if phase == "split":
        half = {name: value / 2 for name, value in code.instructions.items()}
        sums, apply = code.loops if len(code.loops) == 2 else (half, half)
        parts = [
            part("split sums", programs // 2, first, [sums]),
            part("split apply", programs // 2, rest, [apply]),
        ]
    else:
        both = Moved(*(a + b for a, b in zip(first, rest, strict=True)))
        parts = [part(phase, programs, both, code.loops)]
    return LaunchWork(kernel.kernel, kernel.launches, code.warps, code.occupancy, tuple(parts))


def _bytes(norm: Norm, direction: Direction, traffic: Traffic) -> tuple[Moved, Moved]:
    """What the first pass moves, and what follows it does.

    Sectors that are fetched in part count whole. Small tensors go with what is written: nothing
    waits for them but the round trips.
    """
    image = activation_bytes(norm)
    read = LEAST_PASSES[direction] - 1
    fetched = image / traffic.sector_efficiency
    again = max(0.0, traffic.dram - LEAST_PASSES[direction])
    from_l2 = max(0.0, traffic.requested - traffic.dram)
    first = Moved(read * fetched, 0.0, 0.0)
    rest = Moved(again * fetched, fetched + traffic.small * image, from_l2 * fetched)
    return first, rest
