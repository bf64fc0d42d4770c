"""Rounds: a cell on two sides in lockstep, in a fresh process each.

Every process checks and warms up the cell; then they take turns, a short burst of samples each.
What the machine does over more than a burst's time (clocks, other guests, temperature) thus falls
on both alike.

All cells take their rounds in turn; disturbed ones are taken again, to a limit.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from resblock_bench.bench.measure import stats
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.records import NonNegative, Positive, Record, Row, Status

from .party import Ended, Party
from .testbed import Side
from .turns import Turns

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


def measure_pair(
    task: Task, base: Side, head: Side, rule: RoundRule, order: random.Random
) -> Round:
    """One round of a task's cell on both sides, each in a fresh process. Raises RoundError."""
    turns = Turns(order)
    parties: dict[Side, Party] = {}
    rows: dict[Side, Row] = {}
    try:
        for side in order.sample((base, head), 2):
            try:
                parties[side] = side.begin(task)
            except Ended as ended:
                rows[side] = ended.row
            else:
                turns.open(parties[side])
        if len(turns.bursts) == 2:
            turns.read()
            until, count = time.monotonic() + rule.seconds, 0
            while not turns.rows and (count < rule.bursts or time.monotonic() < until):
                turns.round(rule.burst_s)
                count += 1
            turns.read()
        if len(turns.bursts) == 2:
            turns.finish("time")
    finally:
        turns.kill()
    rows |= {side: turns.rows[party] for side, party in parties.items() if party in turns.rows}
    # What is the matter with the head, even where the base failed before.
    for side in (head, base):
        if side in rows and rows[side].status != "ok":
            raise _failed(side, rows[side], at_base=side is base)
    bases, heads = (turns.bursts[parties[side]] for side in (base, head))
    found = turns.conditions()
    assert found is not None
    base_ms, head_ms = list(itertools.chain(*bases)), list(itertools.chain(*heads))
    return Round(
        base_ms=statistics.median(base_ms),
        head_ms=statistics.median(head_ms),
        log_ratio=statistics.median(map(stats.log_ratio, heads, bases)),
        base_samples=len(base_ms),
        head_samples=len(head_ms),
        disturbances=found.disturbances,
        notes=found.notes,
    )


def _failed(side: Side, row: Row, *, at_base: bool) -> RoundError:
    text = f"{side.name}: {row.reason}"
    if at_base and row.status == "wrong":
        text += " (by the float64 result of the installed reference, the truth for both sides)"
    return RoundError(row.status, text, at_base=at_base)


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
