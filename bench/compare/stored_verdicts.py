"""Verdicts on measurements that were not taken in pairs: two that were stored, or two variants.

    plain       head / base, cell by cell, on one machine
    relative    (fused / reference of head) / (fused / reference of base), across machines
    within      fused / reference of one run

Rounds taken apart share no drift that could cancel, so the spread calibrated on the machine
stands in where the rounds show less; see verdict.unpaired.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from msgspec.structs import replace

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.records import Cell, Status, cell_name

from .calibration import Calibration
from .comparison import Compared
from .stored import Stored
from .verdict import Estimate, Tolerance, Verdict, judge, unpaired

_NO_VERDICT = Verdict(
    word="AMBIGUOUS", ratio=None, low=None, high=None, detectable=None, reasons=[]
)


class _Pair(NamedTuple):
    """A cell with its estimate, or why there is none: it failed, or was merely disturbed."""

    cell: Cell
    estimate: Estimate | None
    base: float | None = None
    head: float | None = None
    counts: tuple[int, int] = (0, 0)
    failed: tuple[Status, str] | None = None
    at_base: bool = False
    disturbed: str | None = None


def plain(
    base: Stored, head: Stored, tolerance: Tolerance, calibration: Calibration | None
) -> list[Compared]:
    """head / base of every cell that either was to hold."""
    cells = dict.fromkeys([*base.expected, *head.expected])
    pairs = [_pair(cell, base, cell, head, cell, calibration) for cell in cells]
    return _judged(pairs, tolerance, "ms")


def within(stored: Stored, tolerance: Tolerance, calibration: Calibration | None) -> list[Compared]:
    """fused / reference of every variant of every site. Raises InvalidError without any."""
    pairs = [
        _pair(fused, stored, reference, stored, fused, calibration)
        for reference, fused in _variants(stored)
    ]
    return _judged(pairs, tolerance, "ms")


def relative(
    base: Stored,
    head: Stored,
    tolerance: Tolerance,
    of_base: Calibration | None,
    of_head: Calibration | None,
) -> list[Compared]:
    """How fused / reference changed from base to head, each with the calibration of its machine."""
    pairs: list[_Pair] = []
    variants = dict.fromkeys([*_variants(base), *_variants(head)])
    for reference, fused in variants:
        parts = [
            _pair(fused, run, reference, run, fused, calibration)
            for run, calibration in ((base, of_base), (head, of_head))
        ]
        first, second = (part.estimate for part in parts)
        together = None
        if first is not None and second is not None:
            together = Estimate(
                second.mean - first.mean,
                math.hypot(first.error, second.error),
                min(first.freedom, second.freedom),
                math.exp(first.mean),
                math.exp(second.mean),
            )
        # Within a run both cells are what is judged: at the base is what the base's run lacks.
        problems = [
            part._replace(at_base=run is base) if part.failed else part
            for part, run in zip(parts, (base, head), strict=True)
            if part.failed or part.disturbed
        ]
        heaviest = max(problems, key=_weight, default=parts[0])
        pairs.append(
            _Pair(
                fused,
                together,
                None if first is None else math.exp(first.mean),
                None if second is None else math.exp(second.mean),
                (min(parts[0].counts), min(parts[1].counts)),
                heaviest.failed,
                heaviest.at_base,
                heaviest.disturbed,
            )
        )
    return _judged(pairs, replace(tolerance, absolute_ms=0.0), "× reference")


def _variants(stored: Stored) -> list[tuple[Cell, Cell]]:
    """Each fused cell with its reference."""
    found = [
        (replace(cell, impl="reference"), cell) for cell in stored.expected if cell.impl == "fused"
    ]
    if not found:
        raise InvalidError(f"{stored.name} has no fused cell: there is no ratio to the reference")
    return found


def _pair(
    cell: Cell,
    base: Stored,
    base_cell: Cell,
    head: Stored,
    head_cell: Cell,
    calibration: Calibration | None,
) -> _Pair:
    sides = ((base, base_cell), (head, head_cell))
    found = [_problem(cell, *side, at_base=i == 0) for i, side in enumerate(sides)]
    problems = [problem for problem in found if problem is not None]
    if problems:
        return max(problems, key=_weight)
    base_ms, head_ms = (stored.rounds_ms[wanted] for stored, wanted in sides)
    spread = None if calibration is None else calibration.spread_of(cell)
    return _Pair(
        cell,
        unpaired(base_ms, head_ms, spread),
        statistics.median(base_ms),
        statistics.median(head_ms),
        (len(base_ms), len(head_ms)),
    )


def _problem(cell: Cell, stored: Stored, wanted: Cell, *, at_base: bool) -> _Pair | None:
    """Why a side has no time of the cell, or None."""
    if wanted in stored.rounds_ms:
        return None
    if wanted in stored.disturbed:
        return _Pair(cell, None, disturbed=f"{stored.name}: {stored.disturbed[wanted]}")
    status, reason = stored.missing.get(wanted, ("skipped", "was not planned"))
    sentence = f"{cell_name(wanted)} {reason} in {stored.name}"
    return _Pair(cell, None, failed=(status, sentence), at_base=at_base)


def _weight(pair: _Pair) -> tuple[bool, bool]:
    """Of two problems the heavier: a wrong head, then anything that failed."""
    wrong = pair.failed is not None and pair.failed[0] == "wrong" and not pair.at_base
    return wrong, pair.failed is not None


def _judged(
    pairs: Sequence[_Pair], tolerance: Tolerance, unit: Literal["ms", "× reference"]
) -> list[Compared]:
    verdicts = judge([pair.estimate for pair in pairs], tolerance)
    return list(_compared(pairs, verdicts, unit))


def _compared(
    pairs: Iterable[_Pair], verdicts: Iterable[Verdict], unit: Literal["ms", "× reference"]
) -> Iterable[Compared]:
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if pair.failed or pair.disturbed:
            reason = pair.failed[1] if pair.failed else pair.disturbed or ""
            verdict = replace(_NO_VERDICT, reasons=[reason])
        yield Compared(
            cell=pair.cell,
            verdict=verdict,
            unit=unit,
            base=pair.base,
            head=pair.head,
            counts=pair.counts,
            rounds=[],
            confirming_from=0,
            disturbed=[],
            failed=pair.failed,
            at_base=pair.at_base,
            confirmed=None,
        )
