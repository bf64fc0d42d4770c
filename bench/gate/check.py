"""`check`: the gate. Runs its parts, compares what they find with the pins, and reports.

It fails closed: what is missing, damaged or crashed is a finding, and the entries that are expected
come from the configuration, not from the files found.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from resblock_bench.bench.checkout import repository_root, require_own_code
from resblock_bench.bench.compare.comparison import Compared
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings.findings import Finding, Level, exit_code, is_of_part, of_part
from resblock_bench.bench.findings.report import (
    CheckedEntry,
    Report,
    count_levels,
)

from .pins import PINS, Found, PinFile, PinnedPart, judge, read_pins, save_command

TIMING = "timing"
NO_BASE = "no revision is named to compare the time with: add --base REV"
COLUMNS = ["part", "compared", "as pinned", "worse", "better", "changed", "invalid", "seconds"]


@dataclass(frozen=True)
class PartOutcome:
    """What one part came to; `notes` are sentences on the whole of it, `cells` what was timed."""

    part: str
    checked: list[CheckedEntry]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    cells: list[Compared] = field(default_factory=list)
    seconds: float = 0.0


Check = Callable[[], PartOutcome] | str
"""What carries a part out, or why it cannot be done here."""


def pinned_parts() -> dict[str, PinnedPart]:
    """The parts whose figures are pinned, by name."""
    from . import accuracy as check_accuracy
    from . import memory as check_memory
    from . import static as check_static

    parts = (check_static.PART, check_memory.PART, check_accuracy.PART)
    return {part.name: part for part in parts}


def default_pins(start: Path) -> Path:
    """The pins of the repository around `start`."""
    return repository_root(start) / PINS


def against_pins(pins: Path | None, console: Console) -> dict[str, Check]:
    """The parts whose figures are pinned, by name; `pins` None are those around here."""
    root = pins or default_pins(Path.cwd())
    return {
        name: part.cannot() or functools.partial(check_pinned, part, root, console)
        for name, part in pinned_parts().items()
    }


def check(names: Sequence[str], parts: Mapping[str, Check]) -> list[PartOutcome]:
    """The outcome of each part, or of all parts if none is named.

    A part that cannot be done here is a note, unless it was asked for by name. One that fails as a
    whole is a finding, and Ctrl-C leaves what the parts so far have found.
    """
    outcomes = []
    for name, part in parts.items():
        if names and name not in names:
            continue
        if isinstance(part, str):
            level: Level = "invalid" if names else "note"
            said = of_part(name, level, f"not done here: {part}")
            outcomes.append(PartOutcome(name, [], [said]))
            continue
        began = time.monotonic()
        try:
            outcome = part()
        except KeyboardInterrupt:
            said = of_part(name, "invalid", "interrupted: neither it nor a later part was done")
            outcomes.append(PartOutcome(name, [], [said]))
            break
        except Exception as error:
            outcome = PartOutcome(name, [], [failure(name, error)])
        outcomes.append(replace(outcome, seconds=time.monotonic() - began))
    if not any(outcome.checked or exit_code(outcome.findings) for outcome in outcomes):
        said = of_part("check", "invalid", "nothing was checked")
        outcomes.append(PartOutcome("check", [], [said]))
    return outcomes


def failure(name: str, error: Exception) -> Finding:
    """That a part failed as a whole."""
    expected = isinstance(error, (InvalidError, UsageError))
    text = str(error) if expected else f"crashed: {type(error).__name__}: {error}"
    return of_part(name, "invalid", text)


def check_pinned(part: PinnedPart, root: Path, console: Console) -> PartOutcome:
    """Measure a part and compare it with its pins."""
    require_own_code(Path.cwd())
    pins = read_pins(root, part.name)
    found = part.measure(console)
    return PartOutcome(
        part.name,
        _compared(part, pins, found),
        judge(part, pins, found),
        [part.summary(pins, found)] if part.summary is not None else [],
    )


def _compared(part: PinnedPart, pins: Mapping[str, PinFile], found: Found) -> list[CheckedEntry]:
    """Every entry that was measured and has a pin that holds here."""
    return [
        CheckedEntry(part=part.name, subject=subject, entry=entry)
        for subject, entries in found.subjects.items()
        if subject in pins and pins[subject].made_with == part.made_with()
        for entry in entries
        if entry in pins[subject].entries
    ]


def report_of(outcomes: Sequence[PartOutcome], pins: Path | None = None) -> Report:
    """One row a part, all findings, and what to do about them; `pins` as they were named."""
    findings = [finding for outcome in outcomes for finding in outcome.findings]
    return Report(
        title="check",
        columns=COLUMNS,
        rows=[_row(outcome) for outcome in outcomes],
        checked=[thing for outcome in outcomes for thing in outcome.checked],
        findings=findings,
        notes=[*(note for outcome in outcomes for note in outcome.notes), *advice(findings, pins)],
        cells=[cell for outcome in outcomes for cell in outcome.cells],
    )


def _row(outcome: PartOutcome) -> list[str]:
    counts = count_levels(outcome.findings)
    off = {(f.subject, f.entry) for f in outcome.findings if f.level != "note"}
    same = sum((thing.subject, thing.entry) not in off for thing in outcome.checked)
    return [
        outcome.part,
        str(len(outcome.checked)),
        str(same),
        str(counts["wrong"] + counts["regression"]),
        str(counts["better"]),
        str(counts["changed"] + counts["inconclusive"]),
        str(counts["invalid"]),
        f"{outcome.seconds:.1f}",
    ]


def advice(findings: Sequence[Finding], pins: Path | None = None) -> list[str]:
    """A sentence for each kind of finding on what to do, or that all is as pinned."""

    def save(*levels: Level) -> str | None:
        # A part that failed as a whole has nothing to save, a revision stays as slow as it is.
        parts = dict.fromkeys(
            finding.part
            for finding in findings
            if finding.level in levels and not is_of_part(finding) and finding.part != TIMING
        )
        return save_command(parts, pins) if parts else None

    def among(*levels: Level) -> bool:
        return any(finding.level in levels for finding in findings)

    said = []
    if among("wrong"):
        said.append("wrong: a result is too far from float64; mend it, no pin can allow it")
    if among("regression"):
        how = save("regression")
        said.append(f"worse: mend it{f', or if it is meant to be, {how}' if how else ''}")
    if among("invalid"):
        how = save("invalid")
        right = f"; what is new and right: {how}" if how else ""
        said.append(f"invalid: mend what is said above{right}")
    if how := save("better", "changed"):
        said.append(f"better or changed on purpose: save with {how}")
    if among("inconclusive"):
        said.append("inconclusive: as said above, or measure again on a quiet machine")
    return said or ["all as pinned"]
