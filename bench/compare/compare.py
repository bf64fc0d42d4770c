"""`compare`: a revision and the working tree, two run folders, or the variants of one."""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings.findings import Finding, of_part
from resblock_bench.bench.findings.report import CheckedEntry, Destination, Report, write
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.lockstep.progress import round_progress
from resblock_bench.bench.lockstep.rounds import Round, RoundRule, measure_pair
from resblock_bench.bench.lockstep.testbed import opened
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import Kind, device_kind
from resblock_bench.bench.records import Environment, cell_name

from . import stored
from .calibration import Calibration, read_calibration, stale, tolerance_by
from .comparison import Compared, Comparison
from .machine_store import calibration_file
from .report import COLUMNS, explanation, findings, row, summary
from .source_tree import checked_out, python_paths, repository_around, resolve
from .verdict import DEFAULT_TOLERANCE, Tolerance

HEAD = "the working tree"
PART = "compare"


@dataclass(frozen=True)
class BaseRequest:
    """A revision against the working tree.

    sources   folders that packages are imported from; empty in a checkout of this project
    """

    base: str
    plan: Plan
    start: Path
    timeout_s: float
    sources: Sequence[Path] = ()
    rule: RoundRule = field(default_factory=RoundRule)


@dataclass(frozen=True)
class ComparisonOutcome:
    """What a comparison found.

    uncalibrated   sentences on the machines whose noise is not known
    ended          what ended it before its time, or None
    sudden         head is a later base, so that a great difference needs an explanation
    """

    title: str
    items: list[Compared]
    tolerance: Tolerance
    notes: list[str]
    uncalibrated: list[str]
    ended: str | None = None
    sudden: bool = True


def against_base(request: BaseRequest, console: Console) -> ComparisonOutcome:
    """Measure both in lockstep. Ctrl-C and a full disk leave what the rounds so far say.

    Raises UsageError for a revision or folder that is not there, InvalidError where either side
    cannot be imported.
    """
    repository = repository_around(request.start)
    commit = resolve(repository, request.base)
    name = f"{request.base} ({commit[:9]})"
    with ExitStack() as stack:
        tree = stack.enter_context(checked_out(repository, commit))
        sides = {
            label: python_paths(label, root, request.sources, stack.enter_context(scratch_folder()))
            for label, root in ((name, tree), (HEAD, repository))
        }
        return in_lockstep(request, sides, console, repository if request.sources else None)


def in_lockstep(
    request: BaseRequest,
    sides: Mapping[str, Sequence[Path]],
    console: Console,
    root: Path | None = None,
) -> ComparisonOutcome:
    """Compare two sides: names, and what their Python paths begin with.

    root   of another repository that their packages are of
    """
    with ExitStack() as stack:
        bed = stack.enter_context(
            opened(
                request.plan,
                sides,
                limit_s=request.timeout_s,
                root=root,
            )
        )
        base, head = bed.sides
        order = random.Random(request.plan.seed)
        calibration, note = usable_calibration(
            bed.environment, request.plan.device, request.rule, request.start
        )
        tolerance = tolerance_by(calibration)
        notes = [*bed.notes, *of_others(calibration, bed.tasks)]
        # The digest is of this project's code, which is not what another repository compares.
        if not request.sources and base.code == head.code:
            notes.append(f"{base.name} and {head.name} are the same code")

        def measure(task: Task) -> Round:
            return measure_pair(task, bed.truth(task), base, head, request.rule, order)

        tell = stack.enter_context(round_progress(console, len(bed.tasks)))
        comparison = Comparison(bed.tasks, measure, tolerance, order, tell)
        items, ended = settled(comparison)
        return ComparisonOutcome(
            f"{head.name} against {base.name}",
            items,
            tolerance,
            [*notes, *unknowns(items)],
            [] if note is None else [note],
            ended,
        )


def settled(comparison: Comparison) -> tuple[list[Compared], str | None]:
    """What its rounds say, and what ended it before its time, or None."""
    ended = None
    try:
        comparison.carry_out()
    except KeyboardInterrupt:
        ended = "interrupted"
    except OSError as error:  # such as a full disk
        ended = f"ended by {type(error).__name__}: {error}"
    return comparison.results(), ended


def unknowns(items: Sequence[Compared]) -> list[str]:
    """What could not be known of the machine in some round, each once."""
    rounds = [taken for item in items for taken in (*item.rounds, *item.disturbed)]
    return list(dict.fromkeys(note for taken in rounds for note in taken.notes))


def of_others(calibration: Calibration | None, tasks: Sequence[Task]) -> list[str]:
    """A note where the tolerance comes from other cells than are compared."""
    if calibration is None:
        return []
    known = {noise.cell for noise in calibration.cells}
    count = sum(task.cell not in known for task in tasks)
    if not count:
        return []
    return [f"{count} of {len(tasks)} cells were not calibrated: their tolerance is that of others"]


def usable_calibration(
    environment: Environment, device: Kind, rule: RoundRule, start: Path
) -> tuple[Calibration | None, str | None]:
    """The calibration of a machine, or None and a sentence that says why there is none.

    Raises InvalidError for a damaged file, and for one of another device.
    """
    path = calibration_file(environment, device, start)
    calibration = read_calibration(path)
    default = (
        f"the tolerance is {DEFAULT_TOLERANCE.relative:.0%} by default; run 'resblock-bench "
        f"calibrate --device {device} --threads {environment.threads}'"
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


def of_stored(base: Path, head: Path, start: Path, *, relative: bool) -> ComparisonOutcome:
    """Compare two run folders.

    Raises UsageError for paths that hold none, InvalidError where they cannot be compared.
    """
    if base.resolve() == head.resolve():
        raise UsageError(f"{base} and {head} are one and the same: name two")
    before, after = stored.load(base), stored.load(head)
    stored.refuse_different(before, after, other_machine=relative)
    (of_base, of_head), notes = _calibrations([before, after], start)
    tolerance = tolerance_by(of_head)
    if relative:
        items = stored.relative(before, after, tolerance, of_base, of_head)
        title = f"fused / reference of {head} against that of {base}"
    else:
        items = stored.plain(before, after, tolerance, of_head)
        title = f"{head} against {base}"
    return ComparisonOutcome(title, items, tolerance, [], notes)


def of_variants(folder: Path, start: Path) -> ComparisonOutcome:
    """Compare fused with reference within one run folder."""
    run = stored.load(folder)
    (calibration,), notes = _calibrations([run], start)
    tolerance = tolerance_by(calibration)
    items = stored.within(run, tolerance, calibration)
    title = f"fused against reference in {folder}"
    return ComparisonOutcome(title, items, tolerance, [], notes, sudden=False)


def _calibrations(
    runs: Sequence[stored.Stored], start: Path
) -> tuple[list[Calibration | None], list[str]]:
    """The calibration of each, and notes on machines that have none."""
    found: list[Calibration | None] = []
    notes: dict[str, None] = {}
    for item in runs:
        device = device_kind(str(item.contract["device"]))
        calibration, note = usable_calibration(item.environment, device, RoundRule(), start)
        found.append(calibration)
        if note is not None:
            notes[note] = None
    return found, list(notes)


def carry_out(
    outcome: ComparisonOutcome, to: Destination, console: Console, *, explain: bool
) -> int:
    """Show an outcome; returns the exit code."""
    return write(report_of(outcome, explain=explain), to, console)


def report_of(outcome: ComparisonOutcome, *, explain: bool = False) -> Report:
    """A row a cell, the findings, and what the verdicts rest on."""
    notes = [summary(outcome.items, outcome.tolerance), *outcome.notes, *outcome.uncalibrated]
    return Report(
        title=outcome.title,
        columns=list(COLUMNS),
        rows=[row(item) for item in outcome.items],
        checked=[
            CheckedEntry(part=PART, subject=cell_name(item.cell), entry=None)
            for item in outcome.items
        ],
        findings=findings_of(outcome, PART),
        notes=[*notes, *(explanation(outcome.items) if explain else ())],
        cells=outcome.items,
    )


def findings_of(outcome: ComparisonOutcome, part: str) -> list[Finding]:
    """What a gate has to say of an outcome."""
    found = findings(outcome.items, part, sudden=outcome.sudden)
    if outcome.ended is not None:
        text = f"{outcome.ended}: this is what the rounds taken so far say"
        found.append(of_part(part, "invalid", text))
    return found
