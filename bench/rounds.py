"""One round: a cell on one side or, in lockstep, on two, in a fresh process each.

Every process checks and warms up the cell; then two sides take turns, a short burst of samples
each, in an order drawn anew for every pair. What the machine does over more than a burst's time
(clocks, other guests, temperature) thus falls on both alike, and only one of them ever computes.
"""

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from resblock_bench.bench.conditions import conditions
from resblock_bench.bench.measure import Task
from resblock_bench.bench.records import NonNegative, Positive, Record, Status
from resblock_bench.bench.sides import Side, SideError
from resblock_bench.bench.telemetry import Reading

PositiveMs = Annotated[float, Meta(gt=0)]


class RoundRule(Record, frozen=True, kw_only=True):
    """How much a round samples of each side, at least: bursts, their seconds, and samples."""

    burst_s: NonNegative = 0.03
    bursts: Positive = 12
    samples: Positive = 30


class Round(Record, frozen=True, kw_only=True):
    """A round of both sides: medians over all samples of each, in milliseconds.

    `disturbances` are sentences on what the machine went through; such a round does not count.
    """

    base_ms: PositiveMs
    head_ms: PositiveMs
    base_samples: Positive
    head_samples: Positive
    disturbances: list[str]


class RoundError(Exception):
    """A round that came to nothing; `status` is that of a row, `at_base` whether it was the base's
    doing."""

    def __init__(self, status: Status, reason: str, *, at_base: bool = False) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.at_base = at_base


class Taken(NamedTuple):
    """The samples of each side, in milliseconds, and what disturbed the machine meanwhile."""

    samples_ms: list[list[float]]
    disturbances: list[str]


def measure_pair(
    task: Task, truth: Path, base: Side, head: Side, rule: RoundRule, draw: random.Random
) -> Round:
    """One round of a task's cell on both sides. Raises RoundError."""
    (base_ms, head_ms), disturbances = take_samples(task, truth, (base, head), rule, draw)
    return Round(
        base_ms=statistics.median(base_ms),
        head_ms=statistics.median(head_ms),
        base_samples=len(base_ms),
        head_samples=len(head_ms),
        disturbances=disturbances,
    )


def take_samples(
    task: Task, truth: Path, sides: Sequence[Side], rule: RoundRule, draw: random.Random
) -> Taken:
    """The samples of one round. Raises RoundError."""
    samples: dict[Side, list[float]] = {side: [] for side in sides}
    bursts = 0
    current = sides[0]
    try:
        for current in draw.sample(sides, len(sides)):
            current.open(task, truth)
        before, source = _read(sides)
        while bursts < rule.bursts or min(map(len, samples.values())) < rule.samples:
            for current in draw.sample(sides, len(sides)):
                samples[current] += current.burst(rule.burst_s, rule.samples)
            bursts += 1
        after, _ = _read(sides)
        for current in sides:
            current.end()
    except SideError as error:
        for side in sides:
            side.kill()
        at_base = len(sides) > 1 and current is sides[0]
        raise RoundError(error.status, f"{current.name}: {error}", at_base=at_base) from None
    except BaseException:
        for side in sides:
            side.kill()
        raise
    images = task.cell.batch * sum(map(len, samples.values()))
    found = conditions(
        before, after, source=source, images=images, threads=task.environment.threads
    )
    return Taken(list(samples.values()), found.disturbances)


def _read(sides: Sequence[Side]) -> tuple[Reading, str]:
    """The counters of all sides as those of one process: none is foreign to another."""
    answers = [side.read() for side in sides]
    readings = [answer.reading for answer in answers]
    own = [reading.own_cpu_s for reading in readings if reading.own_cpu_s is not None]
    foreign = readings[0].foreign_processes
    together = replace(
        readings[0],
        own_cpu_s=sum(own) if len(own) == len(sides) else None,
        foreign_processes=None if foreign is None else max(0, foreign - len(sides) + 1),
    )
    return together, answers[0].source
