"""The rounds of cells as they are drawn: all cells in turn, disturbed rounds again, to a limit."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.records import cell_name

from .rounds import Round, RoundError

ATTEMPTS = 2
"""Rounds are taken again until there were this many times as many as are wanted."""

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


def strict(measure: Measure, cannot: str) -> Measure:
    """As `measure`, for what is worth storing only as a whole: raises InvalidError where a round
    comes to nothing. `cannot` is what is then said of the cell."""

    def measured(task: Task) -> Round:
        try:
            return measure(task)
        except RoundError as error:
            raise InvalidError(f"{cell_name(task.cell)} {cannot}: {error}") from None

    return measured


def refuse_few(draws: Iterable[Draw], least: int, cannot: str) -> None:
    """Raises InvalidError for a cell with fewer than `least` valid rounds."""
    for draw in draws:
        if len(draw.valid) < least:
            raise InvalidError(
                f"{cell_name(draw.task.cell)} {cannot}: {len(draw.disturbed)} of "
                f"{len(draw.disturbed) + len(draw.valid)} rounds were disturbed, at last since "
                f"{draw.disturbed[-1].disturbances[0]}; see 'resblock-bench env'"
            )
