"""A prediction of a kernel's time on a GPU: what it asks for, over what the GPU can do.

A launch is a number of programs, of which `slots` = multiprocessors · resident run at once, in
waves. A wave of p programs takes at least

    memory         their bytes from and to memory / copy bandwidth
    L2             their bytes read from L2 / its bandwidth
    issue          instructions of the busiest multiprocessor, ⌈p / multiprocessors⌉ programs, over
                   the lanes that it issues for: lanes · clock · share
    special units  likewise, its results of the special-function units
    in flight      the life of one program, however few there are: round trips to L2 that depend on
                   each other, then turns of its loop, each the latency of its loads and then its
                   instructions: Little's law, p · bytes in flight / latency

and the largest counts, since they overlap. The first wave's bytes flow only after a program's round
trips and one latency. To the waves comes what nothing overlaps with:

    start          the launch, and the time until the first bytes flow
    tail           what the last wave takes beyond its share of the work

A call is its launches one after another, and not shorter than the host needs to make them: `host`.
What takes most of the time bounds it. docs/prediction.md has numbers worked by hand, and what the
model leaves out. Pure arithmetic: figures come from gpu_figures.py, work from launch_work.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from .gpu_figures import GpuFigures

Bound = Literal["memory", "L2", "issue", "special units", "in flight", "start", "tail", "host"]

WARP_SIZE = 32
SCHEDULERS = 4
"""Of a multiprocessor; a warp is always served by the same."""


class Part(NamedTuple):
    """Programs of a launch that all do the same. Bytes and counts are those of all of them.

    programs           of them
    read_bytes         read from memory
    written_bytes      written to memory
    l2_bytes           read from L2
    in_flight_bytes    that one program asks for before it waits, while it streams
    round_trips        to L2 before its first such load, each of which waits for the one before
    instructions       that threads execute, one for each lane
    special            those of them that the special-function units execute
    """

    programs: int
    read_bytes: float
    written_bytes: float
    l2_bytes: float
    in_flight_bytes: float
    round_trips: float
    instructions: float
    special: float


class LaunchWork(NamedTuple):
    """One launch, made `launches` times one after another.

    warps       of a program
    occupancy   share of a multiprocessor's threads that can be resident
    parts       its programs, which take turns: a launch of sums and apply has two
    """

    name: str
    launches: int
    warps: int
    occupancy: float
    parts: tuple[Part, ...]


class Prediction(NamedTuple):
    """Microseconds, what takes most of them, and how they divide by bound: the shares add up."""

    us: float
    bound: Bound
    shares_us: dict[Bound, float]


def predict_call(
    works: Iterable[LaunchWork], gpu: GpuFigures, host_us: float | None = None
) -> Prediction:
    """Predict launches one after another; host_us is what the host takes to make them all."""
    shares = [
        (bound, us * work.launches) for work in works for bound, us in launch_shares_us(work, gpu)
    ]
    return sum_up(shares, host_us)


def sum_up(shares: Iterable[tuple[Bound, float]], host_us: float | None = None) -> Prediction:
    """The prediction that shares add up to. A host that takes longer adds what is missing."""
    total: dict[Bound, float] = {}
    for bound, us in shares:
        if us > 0:
            total[bound] = total.get(bound, 0.0) + us
    device_us = sum(total.values())
    if host_us is not None and host_us > device_us:
        return Prediction(host_us, "host", {**total, "host": host_us - device_us})
    return Prediction(device_us, max(total, key=lambda bound: total[bound]), total)


def launch_shares_us(work: LaunchWork, gpu: GpuFigures) -> list[tuple[Bound, float]]:
    """Microseconds of one launch by what takes them."""
    programs = sum(part.programs for part in work.parts)
    slots = resident_programs(work, gpu) * int(gpu.multiprocessors)
    life = sum(part.programs * life_us(part, work.warps, gpu) for part in work.parts) / programs
    ramp = sum(part.programs * ramp_us(part, gpu) for part in work.parts) / programs

    def busiest(size: int) -> tuple[Bound, float]:
        bounds = wave_bounds_us(work.parts, programs, size, gpu)
        return max(bounds.items(), key=lambda item: item[1])

    shares: list[tuple[Bound, float]] = [("start", gpu.launch_us)]
    full, rest = divmod(programs, slots)
    waves = max(1, full)
    bound, us = busiest(slots if full else rest)
    if life * waves > us * waves + ramp:
        bound, us = "in flight", life
    else:
        shares.append(("start", ramp))
    shares.append((bound, us * waves))
    if full and rest:
        fair = us * rest / slots
        shares += [(bound, fair), ("tail", max(busiest(rest)[1], life) - fair)]
    return shares


def resident_programs(work: LaunchWork, gpu: GpuFigures) -> int:
    """Of a multiprocessor at once."""
    return max(1, int(work.occupancy * gpu.threads / (WARP_SIZE * work.warps) + 1e-6))


def wave_bounds_us(
    parts: Sequence[Part], programs: int, size: int, gpu: GpuFigures
) -> dict[Bound, float]:
    """What `size` of the programs take at least by each bound of throughput."""
    share = size / programs
    busiest = math.ceil(size / gpu.multiprocessors) / programs
    memory = sum(part.read_bytes + part.written_bytes for part in parts)
    lanes_per_s = gpu.issue_lanes * gpu.issue_share * gpu.clock_hz
    return {
        "memory": 1e6 * share * memory / gpu.copy_bytes_per_s,
        "L2": 1e6 * share * sum(part.l2_bytes for part in parts) / gpu.l2_bytes_per_s,
        "issue": 1e6 * busiest * sum(part.instructions for part in parts) / lanes_per_s,
        "special units": 1e6
        * busiest
        * sum(part.special for part in parts)
        / (gpu.special_lanes * gpu.clock_hz),
    }


def life_us(part: Part, warps: int, gpu: GpuFigures) -> float:
    """How long a program lives that has the machine to itself.

    Its instructions take the schedulers that its warps are spread over, with a quarter of the
    special-function units each.
    """
    waits_us = turns(part, part.read_bytes) * gpu.memory_latency_us
    waits_us += turns(part, part.l2_bytes) * gpu.l2_latency_us
    schedulers = min(warps, SCHEDULERS)
    lanes_per_s = WARP_SIZE * schedulers * gpu.issue_share * gpu.clock_hz
    special_per_s = gpu.special_lanes * schedulers / SCHEDULERS * gpu.clock_hz
    executed_s = max(part.instructions / lanes_per_s, part.special / special_per_s) / part.programs
    return part.round_trips * gpu.l2_latency_us + waits_us + 1e6 * executed_s


def ramp_us(part: Part, gpu: GpuFigures) -> float:
    """From the first instruction of a program to its first data."""
    latency_us = 0.0
    if part.read_bytes or part.l2_bytes:
        latency_us = gpu.memory_latency_us if part.read_bytes else gpu.l2_latency_us
    return part.round_trips * gpu.l2_latency_us + latency_us


def turns(part: Part, read: float) -> int:
    """How often a program waits for so many bytes, which all programs read."""
    return math.ceil(read / part.programs / part.in_flight_bytes - 1e-6)
