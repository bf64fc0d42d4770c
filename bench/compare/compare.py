"""`compare`: a revision and the working tree, two run folders, or the variants of one."""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.findings.findings import Finding, Level, of_part
from resblock_bench.bench.findings.report import CheckedEntry, Report
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.lockstep.progress import round_progress
from resblock_bench.bench.lockstep.rounds import Round, RoundRule, measure_pair
from resblock_bench.bench.lockstep.testbed import opened
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import device_kind
from resblock_bench.bench.records import cell_name
from resblock_bench.bench.units import counted

from . import stored
from .calibration import Calibration, of_others, tolerance_by, usable
from .comparison import SUSPICIOUS, Compared, Comparison
from .source_tree import checked_out, python_paths, repository_around, resolve
from .verdict import Tolerance

HEAD = "the working tree"
PART = "compare"
COLUMNS = ["cell", "base", "head", "ratio", "95 % bounds", "verdict", "rounds", "detects"]


@dataclass(frozen=True)
class BaseRequest:
    """A revision against the working tree.

    sources   folders that packages are imported from; empty in a checkout of this project
    cells     the options that name the cells of the plan; empty for those of the gate
    """

    base: str
    plan: Plan
    start: Path
    timeout_s: float
    sources: Sequence[Path] = ()
    cells: Sequence[str] = ()
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
        bed = stack.enter_context(opened(request.plan, sides, limit_s=request.timeout_s, root=root))
        base, head = bed.sides
        order = random.Random(request.plan.seed)
        calibration, note = usable(
            bed.environment, request.plan.device, request.rule, request.start, request.cells
        )
        tolerance = tolerance_by(calibration)
        notes = [*bed.notes, *of_others(calibration, bed.tasks)]
        # The digest is of this project's code, which is not what another repository compares.
        if not request.sources and base.code == head.code:
            notes.append(f"{base.name} and {head.name} are the same code")

        def measure(task: Task) -> Round:
            return measure_pair(task, base, head, request.rule, order)

        tell = stack.enter_context(round_progress(console, len(bed.tasks)))
        comparison = Comparison(bed.tasks, measure, tolerance, order, tell)
        items, ended = _settled(comparison)
        return ComparisonOutcome(
            f"{head.name} against {base.name}",
            items,
            tolerance,
            [*notes, *_unknowns(items)],
            [] if note is None else [note],
            ended,
        )


def _settled(comparison: Comparison) -> tuple[list[Compared], str | None]:
    """What its rounds say, and what ended it before its time, or None."""
    ended = None
    try:
        comparison.carry_out()
    except KeyboardInterrupt:
        ended = "interrupted"
    except OSError as error:  # such as a full disk
        ended = f"ended by {type(error).__name__}: {error}"
    return comparison.results(), ended


def _unknowns(items: Sequence[Compared]) -> list[str]:
    """What could not be known of the machine in some round, each once."""
    rounds = [taken for item in items for taken in (*item.rounds, *item.disturbed)]
    return list(dict.fromkeys(note for taken in rounds for note in taken.notes))


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
        calibration, note = usable(item.environment, device, RoundRule(), start)
        found.append(calibration)
        if note is not None:
            notes[note] = None
    return found, list(notes)


def report_of(outcome: ComparisonOutcome, *, explain: bool = False) -> Report:
    """A row a cell, the findings, and what the verdicts rest on."""
    notes = [summary(outcome.items, outcome.tolerance), *outcome.notes, *outcome.uncalibrated]
    return Report(
        title=outcome.title,
        columns=COLUMNS,
        rows=[_row(item) for item in outcome.items],
        checked=[
            CheckedEntry(part=PART, subject=cell_name(item.cell), entry=None)
            for item in outcome.items
        ],
        findings=findings_of(outcome, PART),
        notes=[*notes, *(_explanation(outcome.items) if explain else ())],
        cells=outcome.items,
    )


def findings_of(outcome: ComparisonOutcome, part: str) -> list[Finding]:
    """What a gate has to say of an outcome."""
    found = []
    for item in outcome.items:
        judged = _finding(item, outcome.sudden)
        if judged is not None:
            level, text = judged
            found.append(Finding(part, level, cell_name(item.cell), None, text))
    if not outcome.items:
        found.append(of_part(part, "invalid", "no cell was compared: nothing is known"))
    if outcome.ended is not None:
        text = f"{outcome.ended}: this is what the rounds taken so far say"
        found.append(of_part(part, "invalid", text))
    return found


def _row(item: Compared) -> list[str]:
    """The columns: medians, their ratio with its one-sided 95 % bounds, and the smallest slowdown
    that as many rounds would have seen with 80 % probability."""
    verdict = item.verdict
    ratio = item.head / item.base if item.head and item.base else None
    bounds = "–"
    if verdict.low is not None and verdict.high is not None:
        bounds = f"{verdict.low:.3f}–{verdict.high:.3f}"
    base, head = item.counts
    return [
        cell_name(item.cell),
        _median(item.base, item.unit),
        _median(item.head, item.unit),
        "–" if ratio is None else f"{verdict.ratio or ratio:.3f}",
        bounds,
        verdict.word if item.failed is None else item.failed[0],
        f"{base}" if base == head else f"{base}/{head}",
        "–" if verdict.detectable is None else f"{verdict.detectable:.1%}",
    ]


def line(item: Compared) -> str:
    """The same in a sentence."""
    name, base, head, ratio, bounds, word, _, detects = _row(item)
    return f"{name}: {base} → {head}, ratio {ratio} ({bounds}), {word}, detects {detects}"


def _median(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.4g} ms" if unit == "ms" else f"{value:.3f}×"


def _finding(item: Compared, sudden: bool) -> tuple[Level, str] | None:
    verdict = item.verdict
    if item.failed is not None:
        status, reason = item.failed
        # A base that is wrong says nothing of the head, but leaves nothing to compare it with.
        return "wrong" if status == "wrong" and not item.at_base else "invalid", reason
    because = "; ".join(verdict.reasons)
    if verdict.ratio is None or verdict.low is None or verdict.high is None:
        return "inconclusive", because
    times = f"{verdict.ratio:.3f} times base ({verdict.low:.3f}–{verdict.high:.3f})"
    if sudden and verdict.ratio * SUSPICIOUS < 1:
        return (
            "invalid",
            f"{1 / verdict.ratio:.1f}× as fast as base: find out what it no longer does",
        )
    if verdict.word == "SLOW":
        return "regression", f"{times}: {because}"
    if verdict.word == "AMBIGUOUS":
        return "inconclusive", f"{times}: {because}"
    if verdict.word == "FAST":
        return "note", f"FAST: {times}"
    return None


def _explanation(items: Sequence[Compared]) -> list[str]:
    """A line a cell: which rules decided."""
    return [
        f"{cell_name(item.cell)}: {item.verdict.word}: {'; '.join(item.verdict.reasons)}"
        + (f"; {len(item.disturbed)} disturbed rounds do not count" if item.disturbed else "")
        for item in items
    ]


def summary(items: Sequence[Compared], tolerance: Tolerance) -> str:
    """Counts of the verdicts, and the tolerance they were given by."""
    words = [item.verdict.word if item.failed is None else "failed" for item in items]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return (
        f"{counted(len(items), 'cell')}: {counts}; tolerance {tolerance.relative:.1%} and "
        f"{tolerance.absolute_ms * 1e3:g} µs"
    )
