"""`baseline`: pins are saved, shown and compared. Nothing is ever saved as a side effect."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resblock_bench.bench import exitcodes
from resblock_bench.bench.checkout import repository_root, require_own_code, source_state
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.findings.findings import (
    Finding,
    exit_code,
    is_of_part,
    of_part,
    worst_first,
)
from resblock_bench.bench.findings.report import WIDTH, sentence, show
from resblock_bench.bench.terminal import say

from .check import (
    against_pins,
    check,
    default_pins,
    failure,
    pinned_parts,
    report_of,
)
from .pins import Found, PinFile, PinnedPart, read_pins, require_writable, save_command, write_pins


def save(names: Sequence[str], reason: str, pins: Path | None, console: Console) -> int:
    """Measure the parts and pin what they find; returns the exit code.

    A part with a wrong or invalid result of its own is not saved. Raises UsageError where no part
    is named, no reason is given, a part cannot be measured here, or the pins cannot be written.
    """
    if not names:
        flags = ", ".join(f"--{name}" for name in pinned_parts())
        raise UsageError(f"nothing is named to be saved: add {flags}")
    if not reason.strip():
        raise UsageError("--reason is empty: say why, for those who review it")
    require_own_code(Path.cwd())
    parts = [pinned_parts()[name] for name in names]
    for part in parts:
        cannot = part.cannot()
        if cannot is not None:
            raise UsageError(f"--{part.name} cannot be saved here: {cannot}")
    root = pins or default_pins(Path.cwd())
    for part in parts:
        require_writable(root, part.name)
    refused: list[Finding] = []
    for part in parts:
        try:
            found = part.measure(console)
        except Exception as error:
            found = Found(findings=[failure(part.name, error)])
        obstacles = _obstacles(part, found)
        if obstacles:
            refused += obstacles
            for finding in worst_first(obstacles):
                say(console, f"{finding.level} {sentence(finding)}")
            say(console, f"{part.name}: not saved")
            continue
        changed = write_pins(root, part, found.subjects, reason.strip(), _commit())
        for path in changed:
            say(console, f"{'saved' if path.exists() else 'removed'} {path}")
        same = len(found.subjects) - sum(path.exists() for path in changed)
        say(console, f"{part.name}: {len(changed)} files changed, {same} as they were")
    return exit_code(refused)


def _obstacles(part: PinnedPart, found: Found) -> list[Finding]:
    """Why what was found must not become what is expected."""
    obstacles = [finding for finding in found.findings if finding.level in ("wrong", "invalid")]
    for subject, entries in found.subjects.items():
        for entry, figures in entries.items():
            bad = [
                name for name, value in figures.items() if part.criteria[name].judge(value, value)
            ]
            if bad:
                text = f"{', '.join(bad)} is not a number"
                obstacles.append(Finding(part.name, "invalid", subject, entry, text))
    if not found.subjects and not obstacles:
        obstacles.append(of_part(part.name, "invalid", "nothing was measured"))
    return obstacles


def _commit() -> str | None:
    """The commit that was measured, "-dirty" where tracked files differ from it."""
    commit, dirty = source_state(repository_root(Path.cwd()))
    return f"{commit}-dirty" if commit and dirty else commit


def show_pins(name: str | None, pins: Path | None, console: Console) -> int:
    """When and why each pin was saved; of a subject, its figures.

    Raises UsageError for a name that is neither a part nor a subject.
    """
    root = pins or default_pins(Path.cwd())
    read = {part: read_pins(root, part) for part in pinned_parts()}
    subjects = [pin for part in read.values() for pin in part.values()]
    named = [pin for pin in subjects if pin.subject == name]
    if name is not None and name not in read and not named:
        raise unknown("part or subject", name, [*read, *(pin.subject for pin in subjects)])
    if named:
        for pin in named:
            _show_figures(pin, console)
        return exitcodes.OK
    shown = [pin for pin in subjects if name in (None, pin.part)]
    if not shown:
        parts = [name] if name in read else read
        say(console, f"{root} holds no pin: save with {save_command(parts, pins)}")
        return exitcodes.INCOMPLETE
    table = Table(pad_edge=False)
    table.add_column("part")
    # Whole, since it is what is asked for: only the reason gives way.
    names = max(len(pin.subject) for pin in shown)
    table.add_column("subject", width=names, overflow="fold")
    table.add_column("entries", justify="right")
    table.add_column("saved", no_wrap=True)
    table.add_column("why", overflow="fold")
    for pin in shown:
        last = pin.saves[-1]
        cells = (pin.part, pin.subject, str(len(pin.entries)), last.saved_at[:10], last.reason)
        table.add_row(*map(Text, cells))
    console.print(table, width=min(console.width, WIDTH))
    return exitcodes.OK


def _show_figures(pin: PinFile, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in pin.made_with.items())
    say(console, f"{pin.part} {pin.subject}{f', made with {versions}' if versions else ''}")
    for last in pin.saves:
        say(console, f"  {last.saved_at} {last.commit or 'no commit'}: {last.reason}")
    for entry, figures in pin.entries.items():
        say(console, f"  {entry}")
        for name, value in figures.items():
            say(console, f"    {name} {f'{value:,}' if isinstance(value, int) else value}")


def diff(names: Sequence[str], pins: Path | None, console: Console) -> int:
    """Measure and show what would be saved: every finding, pinned → found.

    Returns INCOMPLETE where a part could not be measured; what was found is not judged.
    """
    report = report_of(check(names, against_pins(pins, console)), pins)
    show(report, console, limit=None)
    failed = any(is_of_part(one) and one.level == "invalid" for one in report.findings)
    return exitcodes.INCOMPLETE if failed else exitcodes.OK
