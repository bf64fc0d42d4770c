"""`calibrate`: how far two runs of the same code lie apart on this machine, stored for verdicts."""

import datetime
import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from resblock_bench.bench import exitcodes
from resblock_bench.bench.calibration import (
    CALIBRATION_VERSION,
    Calibration,
    CellNoise,
    noise_of,
    tolerance_of,
)
from resblock_bench.bench.comparison import STAGES
from resblock_bench.bench.draws import Draw, fill
from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.machine_store import CALIBRATION, machine_folder, write
from resblock_bench.bench.measure import Task
from resblock_bench.bench.plan import Plan
from resblock_bench.bench.progress import round_progress
from resblock_bench.bench.records import cell_name
from resblock_bench.bench.rounds import Round, RoundError, RoundRule, measure_pair
from resblock_bench.bench.terminal import say, terminable
from resblock_bench.bench.testbed import opened
from resblock_bench.bench.verdict import smallest_detectable

ROUNDS = 15


@dataclass(frozen=True)
class Request:
    """`rounds` of A/A of every cell; `start` is where results/ is looked for."""

    plan: Plan
    start: Path
    rounds: int = ROUNDS
    timeout_s: float = 300.0
    rule: RoundRule = field(default_factory=RoundRule)


def carry_out(request: Request, console: Console) -> int:
    """Measure, store and show; returns the exit code. What is interrupted is not stored.

    Raises InvalidError where a cell cannot be measured or the machine was disturbed too often.
    """
    with terminable(), ExitStack() as stack:
        # Two sides that import what this process would.
        bed = stack.enter_context(
            opened(request.plan, {"A": (), "B": ()}, limit_s=request.timeout_s)
        )
        base, head = bed.sides
        order = random.Random(request.plan.seed)

        def measure(task: Task) -> Round:
            try:
                return measure_pair(task, bed.truth(task), base, head, request.rule, order)
            except RoundError as error:
                name = cell_name(task.cell)
                raise InvalidError(f"{name} cannot be calibrated: {error}") from None

        draws = [Draw(task) for task in bed.tasks]
        tell = stack.enter_context(round_progress(console, len(bed.tasks)))
        fill(draws, request.rounds, measure, order, partial(tell, "calibrating"))
        noises = [_noise(draw) for draw in draws]
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        calibration = Calibration(
            calibration_version=CALIBRATION_VERSION,
            saved_at=now,
            environment=bed.environment,
            rule=request.rule,
            tolerance=tolerance_of(noises),
            cells=noises,
        )
    path = machine_folder(calibration.environment.machine, request.start) / CALIBRATION
    write(path, calibration)
    console.print(_table(calibration))
    say(console, f"tolerance {calibration.tolerance.relative:.1%}; stored in {path}")
    return exitcodes.OK


def _noise(draw: Draw) -> CellNoise:
    if len(draw.valid) < STAGES[0]:
        raise InvalidError(
            f"{cell_name(draw.task.cell)} cannot be calibrated: {len(draw.disturbed)} of "
            f"{len(draw.disturbed) + len(draw.valid)} rounds were disturbed, at last since "
            f"{draw.disturbed[-1].disturbances[0]}; see 'resblock-bench env'"
        )
    return noise_of(draw.task.cell, draw.valid, len(draw.disturbed))


def _table(calibration: Calibration) -> Table:
    table = Table(title=f"A/A on {calibration.environment.machine}", title_justify="left")
    table.add_column("cell")
    for heading in ("rounds", "disturbed", "worst drift", "spread", "detects"):
        table.add_column(heading, justify="right")
    for noise in calibration.cells:
        detects = smallest_detectable(
            calibration.tolerance, noise.pair_spread / STAGES[0] ** 0.5, STAGES[0] - 1
        )
        table.add_row(
            cell_name(noise.cell),
            str(noise.rounds),
            str(noise.disturbed),
            f"{noise.drift:.2%}",
            f"{noise.spread:.2%}",
            f"{detects:.1%}",
        )
    return table
