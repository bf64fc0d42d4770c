"""Decides how many rounds a comparison takes, and what they say: adaptive, confirmed, fail closed.

Every cell gets STAGES[0] rounds, those of all cells shuffled; what is ambiguous then gets more, up
to STAGES[-1]. Rounds in which the machine was disturbed do not count and are taken again, but not
for ever: too few valid ones are no verdict. What is SLOW or FAST is drawn once more from nothing,
and stands only if the second draw says the same.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from msgspec import field
from msgspec.structs import replace

from resblock_bench.bench.lockstep.rounds import Draw, Measure, Round, fill
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.records import Cell, Count, Record, Status

from .verdict import Estimate, Tolerance, Verdict, judge, paired

STAGES = (5, 9, 13)
"""Valid rounds after which a verdict is sought."""
SUSPICIOUS = 3.0
"""Nobody makes a cell so many times as fast unnoticed."""


class Compared(Record, frozen=True, kw_only=True):
    """A cell of a comparison and what its rounds say.

    base, head         medians over the rounds, in `unit`
    counts             valid rounds, or processes, of base and head that the verdict rests on
    rounds             the valid rounds if they were taken in pairs, those of the second draw behind
                       `confirming_from`
    disturbed          rounds that did not count
    failed             status and reason of what came to nothing
    at_base            whether that was the base's doing
    confirmed          whether a second draw said the same; None where none was needed
    """

    cell: Cell
    verdict: Verdict
    unit: Literal["ms", "× reference"]
    base: float | None
    head: float | None
    counts: tuple[Count, Count]
    rounds: list[Round] = field(default_factory=list)
    confirming_from: Count = 0
    disturbed: list[Round] = field(default_factory=list)
    failed: tuple[Status, str] | None
    at_base: bool
    confirmed: bool | None = None


def _estimate(rounds: Sequence[Round]) -> Estimate | None:
    """What the rounds of a cell come to."""
    return paired(
        [taken.log_ratio for taken in rounds],
        [taken.base_ms for taken in rounds],
        [taken.head_ms for taken in rounds],
    )


class Comparison:
    """The rounds of all cells so far; `results` can be asked for at any time.

    tell   called before each round with what it is for
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        measure: Measure,
        tolerance: Tolerance,
        order: random.Random,
        tell: Callable[[str, Draw], None] = lambda stage, draw: None,
    ) -> None:
        self._measure = measure
        self._tolerance = tolerance
        self._order = order
        self._tell = tell
        self._first = {task.cell: Draw(task) for task in tasks}
        self._second: dict[Cell, Draw] = {}

    def carry_out(self) -> list[Compared]:
        """Take all rounds that are needed."""
        self._settle(self._first, "measuring")
        flagged = [
            cell
            for cell, verdict in self._verdicts(self._first).items()
            if verdict.word in ("SLOW", "FAST")
        ]
        self._second = {cell: Draw(self._first[cell].task) for cell in flagged}
        self._settle(self._second, "confirming")
        return self.results()

    def results(self) -> list[Compared]:
        """What the rounds taken so far say."""
        firsts, seconds = self._verdicts(self._first), self._verdicts(self._second)
        found = []
        for cell, first in self._first.items():
            second = self._second.get(cell, Draw(first.task))
            verdict, confirmed = firsts[cell], None
            if verdict.word in ("SLOW", "FAST"):
                other = seconds.get(cell)
                confirmed = other is not None and other.word == verdict.word
                verdict = self._joined(cell, verdict, other)
            elif len(first.valid) < STAGES[0] and first.disturbed and not first.lacks(STAGES[0]):
                why = first.disturbed[-1].disturbances[0]
                text = f"{len(first.disturbed)} of the rounds were disturbed, at last since {why}"
                verdict = replace(verdict, reasons=[text])
            rounds = first.valid + second.valid
            estimate = _estimate(rounds) if rounds else None
            failed = first.failed or second.failed
            found.append(
                Compared(
                    cell=cell,
                    verdict=verdict,
                    unit="ms",
                    base=None if estimate is None else estimate.base_ms,
                    head=None if estimate is None else estimate.head_ms,
                    counts=(len(rounds), len(rounds)),
                    rounds=rounds,
                    confirming_from=len(first.valid),
                    disturbed=first.disturbed + second.disturbed,
                    failed=None if failed is None else (failed.status, str(failed)),
                    at_base=failed is not None and failed.at_base,
                    confirmed=confirmed,
                )
            )
        return found

    def _settle(self, draws: dict[Cell, Draw], stage: str) -> None:
        """Take rounds until no verdict is ambiguous or all stages are done."""
        unsettled = list(draws)
        for count in STAGES:
            wanting = [draws[cell] for cell in unsettled]
            fill(wanting, count, self._measure, self._order, partial(self._tell, stage))
            verdicts = self._verdicts(draws)
            unsettled = [cell for cell in draws if verdicts[cell].word == "AMBIGUOUS"]

    def _verdicts(self, draws: dict[Cell, Draw]) -> dict[Cell, Verdict]:
        estimates = [
            _estimate(draw.valid) if len(draw.valid) >= STAGES[0] else None
            for cell, draw in draws.items()
        ]
        return dict(zip(draws, judge(estimates, self._tolerance), strict=True))

    def _joined(self, cell: Cell, first: Verdict, second: Verdict | None) -> Verdict:
        """The verdict on a flagged cell after its second draw."""
        if second is None:
            return _because(first, "not confirmed by a second draw", word="AMBIGUOUS")
        if second.ratio is None:
            why = "its second draw has too few valid rounds"
            return _because(first, f"not confirmed: {why}", word="AMBIGUOUS")
        both = _estimate(self._first[cell].valid + self._second[cell].valid)
        (joined,) = judge([both], self._tolerance)
        if second.word == first.word:
            return _because(joined, "a second draw says the same", word=first.word)
        reason = f"{first.word} at {first.ratio:.3f} was not confirmed by a second draw"
        word = joined.word if joined.word == "SAME" else "AMBIGUOUS"
        return _because(joined, reason, word=word)


def _because(verdict: Verdict, reason: str, **changes: object) -> Verdict:
    return replace(verdict, reasons=[*verdict.reasons, reason], **changes)
