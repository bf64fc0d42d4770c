"""Rounds: a cell on two sides in lockstep, in a fresh process each.

Every process checks and warms up the cell; then the sides take turns, a short burst of samples
each, in an order drawn anew for every pair. What the machine does over more than a burst's time
(clocks, other guests, temperature) thus falls on both alike, and only one of them ever computes.

All cells take their rounds in turn; disturbed ones are taken again, to a limit.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import NonNegative, Positive, Record, Status

from .sides import Side, SideError

ATTEMPTS = 2
"""Rounds are taken again until there were this many times as many as are wanted."""
PositiveMs = Annotated[float, Meta(gt=0)]


class RoundRule(Record, frozen=True, kw_only=True):
    """How much a round samples, at least.

    burst_s   seconds of a burst, but never less than a sample
    bursts    of each side
    seconds   from the first burst of either side to the last
    """

    burst_s: NonNegative = 0.005
    bursts: Positive = 30
    seconds: NonNegative = 1.5


class Round(Record, frozen=True, kw_only=True):
    """A round of both sides: medians over all samples of each, in milliseconds.

    `log_ratio` is the median over pairs of bursts of log(head / base), each with the medians of its
    samples: a pair lies within some hundredths of a second, in which machines change little.
    `disturbances` are sentences on what the machine went through; such a round does not count.
    `notes` say what of that could not be known.
    """

    base_ms: PositiveMs
    head_ms: PositiveMs
    log_ratio: float
    base_samples: Positive
    head_samples: Positive
    disturbances: list[str]
    notes: list[str]


class RoundError(Exception):
    """A round that came to nothing; `status` is that of a row, `at_base` whether it was the base's
    doing."""

    def __init__(self, status: Status, reason: str, *, at_base: bool = False) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.at_base = at_base


class Taken(NamedTuple):
    """The bursts of samples of each side, in milliseconds, what disturbed the machine, and what of
    that could not be known."""

    bursts_ms: list[list[list[float]]]
    disturbances: list[str]
    notes: list[str]


def measure_pair(
    task: Task, truth: Path, base: Side, head: Side, rule: RoundRule, order: random.Random
) -> Round:
    """One round of a task's cell on both sides. Raises RoundError."""
    (bases, heads), disturbances, notes = take_bursts(task, truth, (base, head), rule, order)
    base_ms, head_ms = list(itertools.chain(*bases)), list(itertools.chain(*heads))
    pairs = zip(bases, heads, strict=True)
    logs = [_log_ratio(b, h) for b, h in pairs]
    return Round(
        base_ms=statistics.median(base_ms),
        head_ms=statistics.median(head_ms),
        log_ratio=statistics.median(logs),
        base_samples=len(base_ms),
        head_samples=len(head_ms),
        disturbances=disturbances,
        notes=notes,
    )


def _log_ratio(base: Sequence[float], head: Sequence[float]) -> float:
    """Of two bursts, from as many samples of each.

    The first ones run on caches that the other side has filled. Of a slower side fewer samples fit
    into a burst, among which these would weigh more and make it look slower still.
    """
    count = min(len(base), len(head))
    return math.log(statistics.median(head[:count]) / statistics.median(base[:count]))


def take_bursts(
    task: Task, truth: Path, sides: Sequence[Side], rule: RoundRule, order: random.Random
) -> Taken:
    """The samples of one round. Raises RoundError."""
    bursts: dict[Side, list[list[float]]] = {side: [] for side in sides}
    try:
        _open(order.sample(sides, len(sides)), task, truth, sides[-1])
        before, source = _read(sides)
        until = time.monotonic() + rule.seconds
        while len(bursts[sides[0]]) < rule.bursts or time.monotonic() < until:
            for side in order.sample(sides, len(sides)):
                bursts[side].append(side.burst(rule.burst_s))
        after, _ = _read(sides)
        for side in sides:
            side.end()
    except SideError as error:
        for side in sides:
            side.abandon()
        at_base = error.side is sides[0]
        text = f"{error.side.name}: {error}"
        if at_base and error.status == "wrong":
            text += " (by the float64 result of the installed reference, the truth for both sides)"
        raise RoundError(error.status, text, at_base=at_base) from None
    except BaseException:
        for side in sides:
            side.kill()
        raise
    images = task.cell.batch * sum(len(burst) for taken in bursts.values() for burst in taken)
    found = conditions(
        before, after, source=source, images=images, threads=task.environment.threads
    )
    return Taken(list(bursts.values()), found.disturbances, found.notes)


def _open(sides: Sequence[Side], task: Task, truth: Path, head: Side) -> None:
    """Raises SideError: what is the matter with the head, even where the base failed before."""
    failed: dict[Side, SideError] = {}
    for side in sides:
        try:
            side.open(task, truth)
        except SideError as error:
            failed[side] = error
    if failed:
        raise failed.get(head) or next(iter(failed.values()))


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


Measure = Callable[[Task], Round]
"""Takes one round of a task; raises RoundError."""


@dataclass
class Draw:
    """The rounds of a task's cell, and what ended them: `failed` is the side's status and reason.

    `disturbed` rounds are those in which the machine was; they do not count.
    """

    task: Task
    valid: list[Round] = field(default_factory=list)
    disturbed: list[Round] = field(default_factory=list)
    failed: RoundError | None = None

    def lacks(self, count: int) -> bool:
        """Whether more rounds are to be taken for `count` valid ones."""
        taken = len(self.valid) + len(self.disturbed)
        return self.failed is None and len(self.valid) < count and taken < ATTEMPTS * count

    def take(self, measure: Measure) -> None:
        """Add a round, or what ended them."""
        try:
            taken = measure(self.task)
        except RoundError as error:
            self.failed = error
        else:
            (self.disturbed if taken.disturbances else self.valid).append(taken)


def fill(
    draws: Iterable[Draw],
    count: int,
    measure: Measure,
    order: random.Random,
    tell: Callable[[Draw], object],
) -> None:
    """Take rounds until no draw lacks any for `count` valid ones, in an order drawn for each pass.

    tell   called before each round
    """
    wanting = [draw for draw in draws if draw.lacks(count)]
    while wanting:
        for draw in order.sample(wanting, len(wanting)):
            tell(draw)
            draw.take(measure)
        wanting = [draw for draw in wanting if draw.lacks(count)]
