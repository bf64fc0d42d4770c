"""Verdicts on run folders, which have one process a cell.

    plain       head / base, cell by cell, on one machine
    relative    (fused / reference of head) / (fused / reference of base), across machines
    within      fused / reference of one run

The variants of a run's block took turns, so their ratio has an interval. Two runs share no drift
that could cancel, and one process shows no spread of processes: those which were calibrated on the
machine stand in.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace
from scipy.special import ndtri

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.machine.environment import difference
from resblock_bench.bench.records import (
    Cell,
    Contract,
    Environment,
    Record,
    Row,
    Status,
    cell_name,
)
from resblock_bench.bench.runs.folder import read_run

from .calibration import Calibration
from .comparison import Compared
from .verdict import Estimate, Tolerance, Verdict, judge, unpaired


class Stored(Record, frozen=True, kw_only=True):
    """A run folder, as something to compare.

    name       the path as it was given
    expected   every cell that was to be measured
    median_ms  of each cell that was
    ratios     of each that took turns with its reference, what their rounds say
    missing    of each cell that was not, the status and reason
    disturbed  of each cell whose process does not count, what disturbed it
    contract   the fields of its timing contract by name
    """

    name: str
    environment: Environment
    expected: list[Cell]
    median_ms: dict[Cell, float]
    ratios: dict[Cell, Estimate]
    missing: dict[Cell, tuple[Status, str]]
    disturbed: dict[Cell, str]
    contract: dict[str, object]


def load(folder: Path) -> Stored:
    """A run folder. Raises UsageError where there is none, InvalidError where it cannot be
    compared."""
    run = read_run(folder)
    expected = [item.cell for item in run.plan.cells]
    median_ms: dict[Cell, float] = {}
    missing: dict[Cell, tuple[Status, str]] = {}
    disturbed: dict[Cell, str] = {}
    ratios: dict[Cell, Estimate] = {}
    contracts = [_fields(row.contract) for row in run.rows]
    for row in run.rows:
        disturbances = row.conditions.disturbances if row.conditions is not None else []
        if row.status != "ok" or row.median_ms is None:
            missing[row.axes] = (row.status, f"is {row.status} ({row.reason})")
        elif disturbances:
            disturbed[row.axes] = disturbances[0]
        else:
            median_ms[row.axes] = row.median_ms
            estimate = _of_rounds(row)
            if estimate is not None:
                ratios[row.axes] = estimate
    if not contracts:
        raise InvalidError(
            f"{folder} holds no whole row: go on with 'resblock-bench run --resume --output "
            f"{folder}'"
        )
    if any(contract != contracts[0] for contract in contracts):
        raise InvalidError(f"{folder} holds rows of several timing contracts: measure it again")
    for cell in expected:
        if cell not in median_ms and cell not in disturbed:
            missing.setdefault(cell, ("skipped", "was planned and not measured"))
    return Stored(
        name=str(folder),
        environment=run.environment,
        expected=expected,
        median_ms=median_ms,
        ratios=ratios,
        missing=missing,
        disturbed=disturbed,
        contract=contracts[0],
    )


def _of_rounds(row: Row) -> Estimate | None:
    """log(own / reference) by the row's ratio; None where that has no interval."""
    ratio, rounds = row.ratio, row.rounds
    if ratio is None or ratio.low is None or ratio.high is None or not rounds or not row.median_ms:
        return None
    half, quantile = math.log(ratio.high / ratio.low) / 2, ndtri((1 + row.contract.confidence) / 2)
    reference_ms = row.median_ms * ratio.value
    return Estimate(
        -math.log(ratio.value), half / quantile, len(rounds) - 1, reference_ms, row.median_ms
    )


def _fields(contract: Contract) -> dict[str, object]:
    """A contract's fields by name, without `step`, which the cell's mode decides."""
    fields: dict[str, object] = msgspec.structs.asdict(contract)
    del fields["step"]
    return fields


def refuse_different(base: Stored, head: Stored, *, other_machine: bool = False) -> None:
    """Raises InvalidError, naming the field, where contracts or fingerprints differ.

    other_machine   only contracts are looked at: ratios within a run survive a change of machine
    """
    if not other_machine:
        found = difference(base.environment, head.environment)
        if found is not None:
            raise InvalidError(
                f"{base.name} and {head.name} cannot be compared: {found}; measure both on one "
                "machine, or compare the ratios of fused to reference with --relative"
            )
    for field in dict.fromkeys([*base.contract, *head.contract]):
        mine, other = base.contract.get(field), head.contract.get(field)
        if mine != other:
            raise InvalidError(
                f"{base.name} and {head.name} cannot be compared: {field} of their timing "
                f"contracts was {mine} and is {other}; measure both in the same way"
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
    base_ms, head_ms = (stored.median_ms[wanted] for stored, wanted in sides)
    if base is head:
        estimate = base.ratios.get(head_cell)
        if estimate is not None and calibration is not None:
            spread = calibration.noise_of(cell).pair_spread
            estimate = dataclasses.replace(estimate, error=math.hypot(estimate.error, spread))
    else:
        known = None if calibration is None else calibration.noise_of(cell).spread
        estimate = unpaired(base_ms, head_ms, known)
    return _Pair(cell, estimate, base_ms, head_ms, (1, 1))


def _problem(cell: Cell, stored: Stored, wanted: Cell, *, at_base: bool) -> _Pair | None:
    """Why a side has no time of the cell, or None."""
    if wanted in stored.median_ms:
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
    found = []
    for pair, verdict in zip(pairs, verdicts, strict=True):
        reason = pair.failed[1] if pair.failed else pair.disturbed
        found.append(
            Compared(
                cell=pair.cell,
                verdict=Verdict(word="AMBIGUOUS", reasons=[reason]) if reason else verdict,
                unit=unit,
                base=pair.base,
                head=pair.head,
                counts=pair.counts,
                failed=pair.failed,
                at_base=pair.at_base,
            )
        )
    return found
