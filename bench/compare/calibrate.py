"""`calibrate`: how far two runs of the same code lie apart on this machine, stored for verdicts."""

import datetime
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.checkout import require_own_code
from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.lockstep.progress import round_progress
from resblock_bench.bench.lockstep.rounds import (
    Draw,
    Round,
    RoundError,
    RoundRule,
    fill,
    measure_pair,
)
from resblock_bench.bench.lockstep.testbed import Testbed, opened
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.records import cell_name
from resblock_bench.bench.terminal import say

from .calibration import (
    CALIBRATION_VERSION,
    Calibration,
    calibration_file,
    noise_of,
    tolerance_of,
)
from .comparison import STAGES
from .verdict import CALIBRATED_FREEDOM, smallest_detectable

_ADVICE = "free it, or run in another folder"


@dataclass(frozen=True)
class CalibrationRequest:
    """`rounds` of A/A of every cell; `start` is where results/ is looked for."""

    plan: Plan
    start: Path
    rounds: int
    timeout_s: float = 300.0
    rule: RoundRule = field(default_factory=RoundRule)


def carry_out(request: CalibrationRequest, console: Console) -> int:
    """Measure, store and show; returns the exit code. What is interrupted is not stored.

    Raises InvalidError where a cell cannot be measured, the machine was disturbed too often, or is
    too noisy for a gate; UsageError where the calibration could not be stored.
    """
    require_own_code(request.start)
    order = random.Random(request.plan.seed)
    draws: list[Draw] = []
    # Anew for every five rounds: what differs between two starts is part of the noise.
    for count in [*range(STAGES[0], request.rounds, STAGES[0]), request.rounds]:
        with ExitStack() as stack:
            # Two sides that import what this process would.
            bed = stack.enter_context(
                opened(request.plan, {"A": (), "B": ()}, limit_s=request.timeout_s)
            )
            environment, notes = bed.environment, bed.notes
            if not draws:
                path = calibration_file(environment, request.plan.device, request.start)
                with files.explained(path, _ADVICE):
                    files.check_writable(path, parents=True)
                draws = [Draw(task) for task in bed.tasks]
            measure = partial(_measure, bed, request.rule, order)
            tell = stack.enter_context(round_progress(console, len(bed.tasks)))
            fill(draws, count, measure, order, partial(tell, "calibrating"))
    _refuse_disturbed(draws)
    noises = [noise_of(draw.task.cell, draw.valid, len(draw.disturbed)) for draw in draws]
    calibration = Calibration(
        calibration_version=CALIBRATION_VERSION,
        saved_at=datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0),
        device=request.plan.device,
        environment=environment,
        rule=request.rule,
        tolerance=tolerance_of(noises),
        cells=noises,
    )
    with files.explained(path, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, files.as_json(calibration), _ADVICE)
    console.print(_table(calibration))
    for note in notes:
        say(console, note)
    say(console, f"tolerance {calibration.tolerance.relative:.1%}; stored in {path}")
    return exitcodes.OK


def _measure(bed: Testbed, rule: RoundRule, order: random.Random, task: Task) -> Round:
    base, head = bed.sides
    try:
        return measure_pair(task, base, head, rule, order)
    except RoundError as error:  # a calibration is worth storing only as a whole
        raise InvalidError(f"{cell_name(task.cell)} cannot be calibrated: {error}") from None


def _refuse_disturbed(draws: Sequence[Draw]) -> None:
    """Raises InvalidError for a cell with too few valid rounds."""
    for draw in draws:
        if len(draw.valid) < STAGES[0]:
            raise InvalidError(
                f"{cell_name(draw.task.cell)} cannot be calibrated: {len(draw.disturbed)} of "
                f"{len(draw.disturbed) + len(draw.valid)} rounds were disturbed, at last since "
                f"{draw.disturbed[-1].disturbances[0]}; see 'resblock-bench env'"
            )


def _table(calibration: Calibration) -> Table:
    """`detects` is the slowdown that five rounds in lockstep see, `stored` the one that two run
    folders show."""
    table = Table(title=f"A/A on {calibration.environment.machine}", title_justify="left")
    table.add_column("cell")
    for heading in ("rounds", "disturbed", "worst drift", "spread", "detects", "stored"):
        table.add_column(heading, justify="right")
    for noise in calibration.cells:
        detects = smallest_detectable(
            calibration.tolerance, noise.pair_spread / STAGES[0] ** 0.5, STAGES[0] - 1
        )
        apart = noise.spread * 2**0.5
        stored = smallest_detectable(calibration.tolerance, apart, CALIBRATED_FREEDOM)
        table.add_row(
            cell_name(noise.cell),
            str(noise.rounds),
            str(noise.disturbed),
            f"{noise.drift:.2%}",
            f"{noise.spread:.2%}",
            f"{detects:.1%}",
            f"{stored:.1%}",
        )
    return table
