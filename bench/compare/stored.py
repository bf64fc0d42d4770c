"""Measurements that were stored, as something to compare: a run folder, or a baseline of a machine.

A run folder has one process a cell, a baseline several rounds of them.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.files import read_versioned
from resblock_bench.bench.grid.plan import difference
from resblock_bench.bench.lockstep.rounds import PositiveMs, RoundRule
from resblock_bench.bench.records import Cell, Contract, Environment, Record, Status
from resblock_bench.bench.runs.folder import read_run

BASELINE_VERSION = 1


class Series(Record, frozen=True, kw_only=True):
    """The medians of a cell's rounds, in milliseconds."""

    cell: Cell
    rounds_ms: Annotated[list[PositiveMs], Meta(min_length=1)]


class Baseline(Record, frozen=True, kw_only=True):
    """What a machine is expected to reach: rounds of one side each, and how they were taken."""

    baseline_version: int
    saved_at: str
    reason: str
    code: str
    environment: Environment
    contract: Contract
    rule: RoundRule
    series: list[Series]


class Stored(Record, frozen=True, kw_only=True):
    """Stored measurements.

    name       the path as it was given
    expected   every cell that was to be measured
    rounds_ms  of each cell that was, the medians of its processes
    missing    of each cell that was not, the status and reason
    disturbed  of each cell whose process does not count, what disturbed it
    contract   the fields of its timing contract by name
    """

    name: str
    environment: Environment
    expected: list[Cell]
    rounds_ms: dict[Cell, list[float]]
    missing: dict[Cell, tuple[Status, str]]
    disturbed: dict[Cell, str]
    contract: dict[str, object]


def load(path: Path) -> Stored:
    """A run folder or the file of a baseline.

    Raises UsageError where there is none, InvalidError where it cannot be compared.
    """
    return _of_run(path) if path.is_dir() else _of_baseline(path)


def read_baseline(path: Path) -> Baseline:
    """A baseline's file. UsageError where there is none, InvalidError where it is damaged."""
    try:
        again = "save it again with 'resblock-bench baseline save --timing'"
        return read_versioned(path, Baseline, "baseline_version", BASELINE_VERSION, again)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): name a run folder or a baseline's file, or "
            "save one with 'resblock-bench baseline save --timing'"
        ) from None


def contract_fields(contract: Contract, rule: RoundRule | None) -> dict[str, object]:
    """A contract's fields by name, with those of the rounds where there are any.

    Without `step`, which the cell's mode decides.
    """
    fields: dict[str, object] = msgspec.structs.asdict(contract)
    del fields["step"]
    if rule is None:
        return {**fields, "process": "one a cell"}
    rounds = msgspec.structs.asdict(rule)
    return {**fields, "process": "rounds", **{f"rounds' {k}": v for k, v in rounds.items()}}


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


def _of_baseline(path: Path) -> Stored:
    baseline = read_baseline(path)
    return Stored(
        name=str(path),
        environment=baseline.environment,
        expected=[series.cell for series in baseline.series],
        rounds_ms={series.cell: series.rounds_ms for series in baseline.series},
        missing={},
        disturbed={},
        contract=contract_fields(baseline.contract, baseline.rule),
    )


def _of_run(folder: Path) -> Stored:
    run = read_run(folder)
    expected = [item.cell for item in run.plan.cells]
    rounds_ms: dict[Cell, list[float]] = {}
    missing: dict[Cell, tuple[Status, str]] = {}
    disturbed: dict[Cell, str] = {}
    contracts = [contract_fields(row.contract, None) for row in run.rows]
    for row in run.rows:
        disturbances = row.conditions.disturbances if row.conditions is not None else []
        if row.status != "ok" or row.median_ms is None:
            missing[row.axes] = (row.status, f"is {row.status} ({row.reason})")
        elif disturbances:
            disturbed[row.axes] = disturbances[0]
        else:
            rounds_ms[row.axes] = [row.median_ms]
    if not contracts:
        raise InvalidError(
            f"{folder} holds no whole row: go on with 'resblock-bench run --resume --output "
            f"{folder}'"
        )
    if any(contract != contracts[0] for contract in contracts):
        raise InvalidError(f"{folder} holds rows of several timing contracts: measure it again")
    for cell in expected:
        if cell not in rounds_ms and cell not in disturbed:
            missing.setdefault(cell, ("skipped", "was planned and not measured"))
    return Stored(
        name=str(folder),
        environment=run.environment,
        expected=expected,
        rounds_ms=rounds_ms,
        missing=missing,
        disturbed=disturbed,
        contract=contracts[0],
    )
