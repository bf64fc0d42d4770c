"""How much two runs of the same code differ on a machine: what `calibrate` stores and verdicts use.

    results/baselines/<machine>/calibration-<device>-<threads>.json

drift of a cell   the largest |mean log ratio| over any STAGES[0] successive rounds of A/A
tolerance         1.5 × the largest drift of any cell, at least 1 % and 1 µs
spread of a cell  the standard deviation of log(median) between processes, which stands in where
                  measurements were not taken in pairs
"""

import datetime
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from resblock_bench.bench.checkout import repository_root
from resblock_bench.bench.errors import InvalidError, command
from resblock_bench.bench.files import read_versioned
from resblock_bench.bench.lockstep.rounds import Round, RoundRule
from resblock_bench.bench.machine.environment import difference
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.records import Cell, Environment, NonNegative, Positive, Record, cell_name

from .comparison import STAGES
from .verdict import DEFAULT_TOLERANCE, LEAST_TOLERANCE, Tolerance

CALIBRATION_VERSION = 1
FACTOR = 1.5
MOST = 0.05
"""A tolerance above this would pass what the gate is there to find."""
MAX_AGE_DAYS = 30
"""Machines change: neighbours, firmware, dust."""


class CellNoise(Record, frozen=True, kw_only=True):
    """What the A/A rounds of a cell showed; drift and spreads are those of logarithms."""

    cell: Cell
    rounds: Positive
    disturbed: int
    drift: NonNegative
    pair_spread: NonNegative
    spread: NonNegative


class Calibration(Record, frozen=True, kw_only=True):
    """The noise of a machine's device. `rule` is how the rounds were taken."""

    calibration_version: int
    saved_at: Annotated[datetime.datetime, Meta(tz=True)]
    device: Kind
    environment: Environment
    rule: RoundRule
    tolerance: Tolerance
    cells: Annotated[list[CellNoise], Meta(min_length=1)]

    def noise_of(self, cell: Cell) -> CellNoise:
        """That of the cell, or the largest of any where it was not calibrated."""
        own = [noise for noise in self.cells if noise.cell == cell]
        return own[0] if own else max(self.cells, key=lambda noise: noise.spread)


def noise_of(cell: Cell, rounds: Sequence[Round], disturbed: int) -> CellNoise:
    """The noise that at least STAGES[0] rounds of the same code show."""
    logs = [taken.log_ratio for taken in rounds]
    count = STAGES[0]
    means = [statistics.fmean(logs[i : i + count]) for i in range(len(logs) - count + 1)]
    sides = [[math.log(r.base_ms) for r in rounds], [math.log(r.head_ms) for r in rounds]]
    return CellNoise(
        cell=cell,
        rounds=len(rounds),
        disturbed=disturbed,
        drift=max(map(abs, means)),
        pair_spread=statistics.stdev(logs),
        spread=max(map(statistics.stdev, sides)),
    )


def tolerance_of(cells: Sequence[CellNoise]) -> Tolerance:
    """The tolerance above. Raises InvalidError for one above MOST."""
    worst = max(cells, key=lambda noise: noise.drift)
    relative = max(LEAST_TOLERANCE.relative, math.expm1(FACTOR * worst.drift))
    if relative > MOST:
        raise InvalidError(
            f"{cell_name(worst.cell)} drifts by {worst.drift:.1%}, which is a tolerance of "
            f"{relative:.1%}, and {MOST:.0%} is the most: calibrate on a quieter machine, or leave "
            "the cell out"
        )
    return Tolerance(relative=relative, absolute_ms=LEAST_TOLERANCE.absolute_ms)


def tolerance_by(calibration: Calibration | None) -> Tolerance:
    """The calibrated tolerance, or that of a machine which was not."""
    return DEFAULT_TOLERANCE if calibration is None else calibration.tolerance


def calibration_file(environment: Environment, device: Kind, start: Path) -> Path:
    """The calibration of a machine's device, with as many threads, in the repository around
    `start`."""
    folder = repository_root(start) / "results" / "baselines" / environment.machine
    return folder / f"calibration-{device}-{environment.threads}.json"


def read_calibration(path: Path) -> Calibration | None:
    """None where there is no file. Raises InvalidError for one that is damaged, or of another
    schema."""
    again = "run 'resblock-bench calibrate' again"
    try:
        calibration = read_versioned(
            path, Calibration, "calibration_version", CALIBRATION_VERSION, again
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidError(f"{path} cannot be read ({error.strerror}): check the file") from None
    if not LEAST_TOLERANCE.relative <= calibration.tolerance.relative <= MOST:
        raise InvalidError(
            f"{path} has a tolerance of {calibration.tolerance.relative:.1%}, and it is "
            f"{LEAST_TOLERANCE.relative:.0%} to {MOST:.0%}: {again}"
        )
    if calibration.tolerance.absolute_ms != LEAST_TOLERANCE.absolute_ms:
        raise InvalidError(
            f"{path} has an absolute tolerance of {calibration.tolerance.absolute_ms:g} ms, and it "
            f"is {LEAST_TOLERANCE.absolute_ms:g} ms: {again}"
        )
    return calibration


def stale(
    calibration: Calibration,
    environment: Environment,
    rule: RoundRule,
    now: datetime.datetime | None = None,
) -> str | None:
    """Why a calibration no longer holds, or None."""
    found = difference(calibration.environment, environment)
    if found is not None:
        return found
    if calibration.rule != rule:
        return "its rounds were taken in another way"
    now = now or datetime.datetime.now(datetime.timezone.utc)
    age = (now - calibration.saved_at).days
    if age < 0:
        return f"it is of {calibration.saved_at:%Y-%m-%d}, which is yet to come"
    return f"it is {age} days old" if age > MAX_AGE_DAYS else None


def usable(
    environment: Environment, device: Kind, rule: RoundRule, start: Path, cells: Sequence[str] = ()
) -> tuple[Calibration | None, str | None]:
    """The calibration of a machine, or None and a sentence that says why there is none.

    cells   the options that name those which are compared; none are those of the gate

    Raises InvalidError for a damaged file, and for one of another device.
    """
    path = calibration_file(environment, device, start)
    calibration = read_calibration(path)
    options = ("--device", device, "--threads", str(environment.threads), *cells)
    default = (
        f"the tolerance is {DEFAULT_TOLERANCE.relative:.0%} by default; run: "
        f"{command('calibrate', *options)}"
    )
    if calibration is None:
        threads = f"{environment.threads} thread{'s' if environment.threads > 1 else ''}"
        machine = f"{environment.machine}, {threads} on {device},"
        return None, f"{machine} was never calibrated: {default}"
    if calibration.device != device:
        raise InvalidError(
            f"{path} is a calibration of {calibration.device}, not of {device}: run "
            f"'resblock-bench calibrate --device {device}' again"
        )
    reason = stale(calibration, environment, rule)
    if reason is not None:
        return None, f"the calibration of {environment.machine} is stale ({reason}): {default}"
    return calibration, None


def of_others(calibration: Calibration | None, tasks: Sequence[Task]) -> list[str]:
    """A note where the tolerance comes from other cells than are compared."""
    if calibration is None:
        return []
    known = {noise.cell for noise in calibration.cells}
    count = sum(task.cell not in known for task in tasks)
    if not count:
        return []
    return [f"{count} of {len(tasks)} cells were not calibrated: their tolerance is that of others"]
