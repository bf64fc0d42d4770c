"""The timing baseline of a machine, and what the working tree reaches against it.

It is saved on purpose, with a reason, and the earlier ones are kept. Baseline and working tree are
measured in the same way: rounds of one side, a fresh process each.
"""

import datetime
import math
import random
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from resblock_bench.bench import exitcodes
from resblock_bench.bench.checkout import require_own_code
from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.grid.plan import Plan, difference
from resblock_bench.bench.lockstep.draws import Draw, fill, refuse_few, strict
from resblock_bench.bench.lockstep.progress import round_progress
from resblock_bench.bench.lockstep.rounds import Round, RoundError, RoundRule, take_bursts
from resblock_bench.bench.lockstep.testbed import Testbed, opened
from resblock_bench.bench.measure.cell import Task, contract_of
from resblock_bench.bench.records import Cell, cell_name
from resblock_bench.bench.terminal import say

from .calibration import tolerance_by
from .compare import (
    HEAD,
    Outcome,
    of_others,
    settled,
    unknowns,
    usable_calibration,
)
from .comparison import STAGES, Comparison
from .machine_store import (
    TIMING,
    history,
    machine_folder,
    writable,
    write,
)
from .stored import (
    BASELINE_VERSION,
    Baseline,
    Series,
    contract_fields,
    read_baseline,
)
from .verdict import Estimate, unpaired

_CANNOT = "is no baseline"
ROUNDS = 9
"""Of every cell of a baseline: what it is off by, everything that is compared with it is, too."""


@dataclass(frozen=True)
class Request:
    """The cells of the gate; `start` is where results/ is looked for."""

    plan: Plan
    start: Path
    timeout_s: float = 300.0
    telemetry: Path | None = None
    rule: RoundRule = field(default_factory=RoundRule)


def save(request: Request, reason: str, console: Console) -> int:
    """Measure a baseline and store it; returns the exit code. What is interrupted is not stored.

    Raises InvalidError where a cell cannot be measured or the machine was disturbed too often.
    """
    with ExitStack() as stack:
        bed = stack.enter_context(_bed(request))
        path = machine_folder(bed.environment.machine, request.start) / TIMING
        writable(path)
        order = random.Random(request.plan.seed)

        def measure(task: Task) -> Round:
            return _lone_round(bed, task, request.rule, order, None)

        draws = [Draw(task) for task in bed.tasks]
        tell = stack.enter_context(round_progress(console, len(bed.tasks)))
        fill(draws, ROUNDS, strict(measure, _CANNOT), order, partial(tell, "measuring"))
        refuse_few(draws, STAGES[0], _CANNOT)
        baseline = Baseline(
            baseline_version=BASELINE_VERSION,
            saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            reason=reason,
            code=bed.sides[0].code,
            environment=bed.environment,
            contract=contract_of(bed.tasks[0]),
            rule=request.rule,
            series=[
                Series(cell=draw.task.cell, rounds_ms=[taken.head_ms for taken in draw.valid])
                for draw in draws
            ],
        )
    for note in bed.notes:
        say(console, note)
    write(path, baseline, keep=_saved_at(path))
    show(path, console)
    return exitcodes.OK


def against_baseline(request: Request, path: Path, console: Console) -> Outcome:
    """Measure the working tree and compare it with a baseline's file.

    Raises UsageError where there is no file, InvalidError for one that cannot be compared: damaged,
    of another schema, machine or contract.
    """
    baseline = read_baseline(path)
    known = {series.cell: series.rounds_ms for series in baseline.series}
    with ExitStack() as stack:
        bed = stack.enter_context(_bed(request))
        _refuse_different(path, baseline, bed, request.rule)
        calibration, note = usable_calibration(
            bed.environment, request.plan.device, request.rule, request.start
        )
        order = random.Random(request.plan.seed)

        def measure(task: Task) -> Round:
            if task.cell not in known:
                reason = f"has no baseline in {path}: save one"
                raise RoundError("skipped", reason, at_base=True)
            return _lone_round(bed, task, request.rule, order, known[task.cell])

        def estimate(cell: Cell, rounds: Sequence[Round]) -> Estimate | None:
            spread = None if calibration is None else calibration.spread_of(cell)
            return unpaired(known[cell], [taken.head_ms for taken in rounds], spread)

        tell = stack.enter_context(round_progress(console, len(bed.tasks)))
        tolerance = tolerance_by(calibration)
        comparison = Comparison(bed.tasks, measure, tolerance, order, tell, estimate)
        items, ended = settled(comparison)
        return Outcome(
            f"{HEAD} against the baseline of {baseline.saved_at[:10]}",
            items,
            tolerance,
            [*bed.notes, *of_others(calibration, bed.tasks), *unknowns(items)],
            [] if note is None else [note],
            ended,
            stored=True,
        )


def show(path: Path, console: Console) -> int:
    """The baseline of a machine, and when and why each was saved."""
    baseline = read_baseline(path)
    table = Table(title=f"baseline of {baseline.environment.machine}", title_justify="left")
    table.add_column("cell")
    for heading in ("rounds", "median ms", "spread"):
        table.add_column(heading, justify="right")
    for series in baseline.series:
        median = statistics.median(series.rounds_ms)
        spread = statistics.stdev(series.rounds_ms) / median
        table.add_row(
            cell_name(series.cell), str(len(series.rounds_ms)), f"{median:.4g}", f"{spread:.1%}"
        )
    console.print(table)
    for file in [*history(path), path]:
        try:
            saved = read_baseline(file)
        except InvalidError as error:
            say(console, f"{error}")
        else:
            say(console, f"{saved.saved_at} {file.name}: {saved.reason}")
    return exitcodes.OK


def _bed(request: Request) -> AbstractContextManager[Testbed]:
    require_own_code(request.start)
    return opened(
        request.plan,
        {HEAD: ()},
        limit_s=request.timeout_s,
        telemetry=request.telemetry,
    )


def _lone_round(
    bed: Testbed, task: Task, rule: RoundRule, order: random.Random, known: list[float] | None
) -> Round:
    """A round of one side, beside the baseline's median where there is one."""
    (bursts,), disturbances, notes = take_bursts(task, bed.truth(task), bed.sides, rule, order)
    samples = [sample for burst in bursts for sample in burst]
    median = statistics.median(samples)
    base = median if known is None else statistics.median(known)
    return Round(
        base_ms=base,
        head_ms=median,
        log_ratio=math.log(median / base),
        base_samples=len(known or samples),
        head_samples=len(samples),
        disturbances=disturbances,
        notes=notes,
    )


def _saved_at(path: Path) -> str | None:
    """When the present baseline was saved; None where there is none."""
    if not path.exists():
        return None
    try:
        return read_baseline(path).saved_at
    except InvalidError:  # another schema: it is kept all the same
        modified = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
        return modified.isoformat(timespec="seconds")


def _refuse_different(path: Path, baseline: Baseline, bed: Testbed, rule: RoundRule) -> None:
    found = difference(baseline.environment, bed.environment)
    if found is not None:
        raise InvalidError(
            f"{path} cannot be compared with this machine: {found}; save a baseline here"
        )
    mine = contract_fields(baseline.contract, baseline.rule)
    here = contract_fields(contract_of(bed.tasks[0]), rule)
    for name, value in here.items():
        if mine[name] != value:
            raise InvalidError(
                f"{path} was measured in another way: {name} was {mine[name]} and is {value}; "
                "save it again"
            )
