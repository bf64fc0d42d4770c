"""The rounds of cells as they are drawn: all cells in turn, disturbed rounds again, to a limit."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from resblock_bench.bench.measure.cell import Task

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
