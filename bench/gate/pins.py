"""Pins: what is expected of the kernels, in committed files that people read and review.

    <root>/<part>/<subject>.json        part: static, memory, accuracy

A file is a subject, an entry one thing in it (a kernel on an architecture, a variant of a block), a
figure a number or word of an entry. Pins are compared both ways: what is worse fails, and what is
better asks to be saved, since a pin with slack would let the next regression pass.
"""

import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta
from rich.console import Console

from resblock_bench.bench import files
from resblock_bench.bench.errors import InvalidError, command
from resblock_bench.bench.findings.findings import LEVELS, Finding, Level
from resblock_bench.bench.records import Record

PINS_VERSION = 1
PINS = Path("results", "pins")
"""Where the pins are, from the root of a repository."""
_ADVICE = "name another folder with --pins"

Value = int | float | str | None
Entries = dict[str, dict[str, Value]]
"""Figures of each entry of a subject. A number that is not finite is None."""


class Save(Record, frozen=True, kw_only=True):
    """When and why a pin was saved, oldest first; the contents of earlier ones are in git."""

    saved_at: str
    commit: str | None
    reason: str


class PinFile(Record, frozen=True, kw_only=True):
    """The content of a pin file. `made_with` are the versions that its figures depend on."""

    pins_version: int
    part: str
    subject: str
    made_with: dict[str, str | None]
    saves: Annotated[list[Save], Meta(min_length=1)]
    entries: Entries


@dataclass(frozen=True)
class Criterion:
    """How a figure is judged.

    better      which way is better; None for a word or number that can only be the same or not
    tolerance   relative change that is still the same
    hard        worse is a regression; otherwise it is a change whose meaning needs a timing run
    """

    better: Literal["lower", "higher"] | None
    tolerance: float = 0.0
    hard: bool = True

    def judge(self, pinned: Value, found: Value) -> Level | None:
        """The level of a change from `pinned` to `found`; None where it is the same."""
        if found is None or (isinstance(found, float) and not math.isfinite(found)):
            return "invalid"
        if pinned == found:
            return None
        if pinned is None or isinstance(pinned, str) or isinstance(found, str) or not self.better:
            return "changed"
        if max(abs(pinned), abs(found)) <= (1 + self.tolerance) * min(abs(pinned), abs(found)):
            return None
        if (found < pinned) == (self.better == "lower"):
            return "better"
        return "regression" if self.hard else "changed"


@dataclass
class Found:
    """What a part measured: entries by subject, and findings that need no pin."""

    subjects: dict[str, Entries] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class PinnedPart:
    """A part of `check` whose figures are the same on every machine.

    name        of the part and of its folder
    cannot()    why this machine cannot do it, or None
    measure     every subject of the configuration, with progress on the console; what crashed is
                an "invalid" finding
    criteria    of every figure by name
    made_with() the versions on which the figures depend; with others they are not compared
    summary     a sentence on the whole, from pins and what was found
    """

    name: str
    cannot: Callable[[], str | None]
    measure: Callable[[Console], Found]
    criteria: Mapping[str, Criterion]
    made_with: Callable[[], dict[str, str | None]]
    summary: Callable[[Mapping[str, PinFile], Found], str] | None = None


def save_command(parts: Iterable[str], pins: Path | None) -> str:
    """What saves parts where they were looked for."""
    where = () if pins is None else ("--pins", str(pins))
    flags = (f"--{part}" for part in parts)
    return f"{command('baseline', 'save', *flags, *where)} --reason '…'"


def read_pins(root: Path, part: str) -> dict[str, PinFile]:
    """The pins of a part by subject, none where there is no folder.

    Raises InvalidError for a file that is damaged or of another schema.
    """
    pins = [_read(path) for path in _files(root, part)]
    return {pin.subject: pin for pin in pins}


def _files(root: Path, part: str) -> list[Path]:
    return sorted((root / part).glob("*.json"))


def _read(path: Path) -> PinFile:
    try:
        part, root = path.parent.name, path.parent.parent
        again = f"save it again with {save_command([part], root)}"
        pin = files.read_versioned(path, PinFile, "pins_version", PINS_VERSION, again)
    except OSError as error:
        raise InvalidError(f"{path} cannot be read ({error.strerror}): check the file") from None
    if (pin.part, pin.subject) != (path.parent.name, path.stem):
        raise InvalidError(
            f"{path} says that it is {pin.part}/{pin.subject}: it was renamed, restore it from git"
        )
    return pin


def judge(part: PinnedPart, pins: Mapping[str, PinFile], found: Found) -> list[Finding]:
    """One finding for each entry that is not as pinned, in order, after the part's own."""
    findings = list(found.findings)
    crashed = {(finding.subject, finding.entry) for finding in findings}

    def say(level: Level, subject: str, entry: str | None, text: str) -> None:
        findings.append(Finding(part.name, level, subject, entry, text))

    made_with = part.made_with()
    for subject, entries in found.subjects.items():
        pin = pins.get(subject)
        if pin is None:
            say("invalid", subject, None, "has no pin: save one")
            continue
        if pin.made_with != made_with:
            say("invalid", subject, None, _other_versions(pin.made_with, made_with))
            continue
        for entry, figures in entries.items():
            if entry not in pin.entries:
                say("invalid", subject, entry, "has no pin: save one")
                continue
            changes = _changes(part.criteria, pin.entries[entry], figures)
            if changes:
                level = min((level for level, _ in changes), key=LEVELS.index)
                say(level, subject, entry, "; ".join(text for _, text in changes))
        for entry in pin.entries:
            if entry not in entries and (subject, entry) not in crashed:
                say("invalid", subject, entry, "is pinned and was not measured")
    for subject in pins:
        if subject not in found.subjects and (subject, None) not in crashed:
            say("invalid", subject, None, "is pinned and was not measured")
    if not found.subjects and not findings:
        say("invalid", part.name, None, "nothing was measured")
    return findings


def _other_versions(pinned: dict[str, str | None], here: dict[str, str | None]) -> str:
    names = [name for name in {**pinned, **here} if pinned.get(name) != here.get(name)]
    return "; ".join(f"was pinned with {n} {pinned.get(n)}, here is {here.get(n)}" for n in names)


def _changes(
    criteria: Mapping[str, Criterion], pinned: Mapping[str, Value], found: Mapping[str, Value]
) -> list[tuple[Level, str]]:
    changes: list[tuple[Level, str]] = []
    for name in dict.fromkeys([*found, *pinned]):
        if name not in found:
            changes.append(("invalid", f"{name} is pinned and was not measured"))
            continue
        value = found[name]
        if name not in pinned:
            changes.append(("invalid", f"{name} has no pin"))
        elif None not in (pinned[name], value) and _is_word(pinned[name]) != _is_word(value):
            what = "a number" if _is_word(pinned[name]) else "a word"
            text = f"{name} is pinned as {pinned[name]!r}, which is not {what}: restore it from git"
            changes.append(("invalid", text))
        else:
            level = criteria[name].judge(pinned[name], value)
            if level is not None:
                changes.append((level, f"{name} {_text(pinned[name])} → {_text(value)}"))
    return changes


def _is_word(value: Value) -> bool:
    return isinstance(value, str)


def _text(value: Value) -> str:
    if value is None:
        return "not a number"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def write_pins(
    root: Path, part: PinnedPart, subjects: Mapping[str, Entries], reason: str, commit: str | None
) -> list[Path]:
    """Save the subjects of a part, and remove pins of subjects that are no more.

    Returns the files that changed. One whose figures are as pinned is left as it is. Raises
    InvalidError for a damaged pin; one of another schema is replaced.
    """
    before = _saved(root, part.name)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    changed: list[Path] = []
    folder = root / part.name
    with files.explained(root, _ADVICE):
        files.make_folder(folder)
        for subject, entries in subjects.items():
            path = folder / f"{subject}.json"
            old = before.get(subject)
            if old and (old.entries, old.made_with) == (entries, part.made_with()):
                continue
            saves = [*(old.saves if old else []), Save(saved_at=now, commit=commit, reason=reason)]
            pin = PinFile(
                pins_version=PINS_VERSION,
                part=part.name,
                subject=subject,
                made_with=part.made_with(),
                saves=saves,
                entries=entries,
            )
            with files.whole(path) as file:
                file.write(files.as_json(pin))
            changed.append(path)
        for subject in before.keys() - subjects.keys():
            path = folder / f"{subject}.json"
            path.unlink()
            changed.append(path)
    return changed


def _saved(root: Path, part: str) -> dict[str, PinFile | None]:
    """The pins of a part by subject, None for one of another schema. Raises InvalidError for a
    damaged one."""
    saved: dict[str, PinFile | None] = {}
    for path in _files(root, part):
        try:
            saved[path.stem] = _read(path)
        except files.OtherSchemaError:
            saved[path.stem] = None
    return saved


def require_writable(root: Path, part: str) -> None:
    """Raises what `write_pins` would: what was measured for minutes is not to be lost."""
    _saved(root, part)
    with files.explained(root, _ADVICE):
        files.check_writable(root / part / "any.json", parents=True)
