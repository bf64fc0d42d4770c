"""What a gate has to say, and how it is written: a table, Markdown, JSON or JUnit's XML."""

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resblock_bench.bench import exitcodes, files, markdown
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.markdown import escaped
from resblock_bench.bench.records import Record
from resblock_bench.bench.terminal import SafeConsole, say, visible

from .findings import LEVELS, Finding, Level, exit_code, worst_first

REPORT_VERSION = 1
WIDTH = 100
SHOWN = 20
"""Findings that a terminal shows."""
MARKDOWN_LIMIT = 60_000
"""Characters; a comment on GitHub holds 65,536."""
_ADVICE = "name another file"
_FOLDED = 10  # findings above which Markdown folds them up

_STYLES: dict[Level, str] = {
    "wrong": "bold red",
    "regression": "red",
    "invalid": "red",
    "changed": "yellow",
    "better": "green",
    "inconclusive": "yellow",
    "note": "dim",
}


class CheckedEntry(Record, frozen=True, kw_only=True):
    """One thing that was compared; it is as expected where no finding names it."""

    part: str
    subject: str
    entry: str | None


class Report(Record, frozen=True, kw_only=True):
    """The outcome of a gate.

    columns, rows   a table; its first column is words, the others are numbers
    checked         everything that was compared
    findings        everything that is not as expected
    notes           sentences on the whole, shown last
    cells           every cell that was timed, with its rounds; in the JSON alone
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    checked: list[CheckedEntry]
    findings: list[Finding]
    notes: list[str]
    cells: list[Any] = msgspec.field(default_factory=list)


class Document(Record, frozen=True, kw_only=True):
    """A report as JSON."""

    report_version: int
    exit_code: int
    report: Report


class Destination(NamedTuple):
    """Where a report goes: its format, and a file or, without one, the standard output."""

    format: str
    file: Path | None


def destination(format: str, file: Path | None) -> Destination:
    """Raises UsageError for an unknown format and where the file cannot be written."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if file is not None:
        with files.explained(file, _ADVICE):
            files.check_writable(file, named=True)
    return Destination(format, file)


def write(report: Report, to: Destination, console: Console) -> int:
    """The table on the console and the format in the file, or the format alone on the console.

    Returns the report's exit code. A pass that could not be written down is INCOMPLETE.
    """
    code = exit_code(report.findings)
    if to.file is None and to.format != "table":
        console.file.write(FORMATS[to.format](report))
        console.file.flush()  # what cannot be written fails here, not at the end of the process
        return code
    show(report, console)
    if to.file is None:
        return code
    try:
        files.write(to.file, FORMATS[to.format](report).encode(), _ADVICE, named=True)
    except UsageError as error:
        say(console, str(error))
        return code or exitcodes.INCOMPLETE
    return code


def show(report: Report, console: Console, limit: int | None = SHOWN) -> None:
    """The report on a terminal, its `limit` worst findings, 100 columns wide at most."""
    width = min(console.width, WIDTH)
    if report.rows:
        table = Table(title=Text(report.title), title_justify="left", pad_edge=False)
        for number, column in enumerate(report.columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in report.rows:
            table.add_row(*map(Text, row))
        console.print(table, width=width)
    findings = worst_first(report.findings)
    for finding in findings[:limit]:
        text = Text.assemble((finding.level, _STYLES[finding.level]), " ", sentence(finding))
        console.print(text, width=width)
    if limit is not None and len(findings) > limit:
        say(console, f"… {len(findings) - limit} more, see --format json")
    for note in report.notes:
        say(console, note)


def sentence(finding: Finding) -> str:
    """What it is about, and its text."""
    return f"{_name(finding)}: {finding.text}"


def _name(thing: Finding | CheckedEntry) -> str:
    parts = (thing.part, thing.subject, thing.entry)
    return " ".join(dict.fromkeys(part for part in parts if part))


def _table(report: Report) -> str:
    file = io.StringIO()
    show(report, SafeConsole(file=file, width=WIDTH), limit=None)
    return file.getvalue()


def _json(report: Report) -> str:
    document = Document(
        report_version=REPORT_VERSION, exit_code=exit_code(report.findings), report=report
    )
    return files.as_json(document).decode()


def _markdown(report: Report) -> str:
    """Fit for a comment: many findings folded up, and what is too long cut with a count."""
    heading, rule, *rows = markdown.table(report.columns, report.rows)
    head = [f"### {escaped(report.title)}", "", heading, rule]
    findings = [
        f"- **{finding.level}** {escaped(sentence(finding))}"
        for finding in worst_first(report.findings)
    ]
    notes = [escaped(note) for note in report.notes]
    kept = MARKDOWN_LIMIT - _length([*head, *notes]) - 500  # for what stands between
    rows = _cut(rows, kept if not findings else kept // 2, "rows")
    findings = _cut(findings, kept - _length(rows), "findings")
    if len(findings) > _FOLDED:
        count = f"<details><summary>{len(report.findings)} findings</summary>"
        findings = [count, "", *findings, "", "</details>"]
    body = [*head, *rows, "", *findings, ""]
    return "\n".join([*body, *("\n".join((note, "")) for note in notes)]).rstrip() + "\n"


def _length(lines: Sequence[str]) -> int:
    return sum(len(line) + 2 for line in lines)


def _cut(lines: list[str], limit: int, what: str) -> list[str]:
    """The first lines that fit, and then how many are missing."""
    lengths = itertools.accumulate(_length([line]) for line in lines)
    kept = sum(length <= limit for length in lengths)
    if kept == len(lines):
        return lines
    return [*lines[:kept], "", f"… {len(lines) - kept} more {what}, see --format json"]


def _junit(report: Report) -> str:
    """A test case for everything that was compared, and for each finding about anything else.

    A case fails exactly where the exit code is not 0: "invalid" is an error, every other level but
    a note a failure. A note about what was not compared is a skipped case.
    """
    named: dict[tuple[str, str, str | None], list[Finding]] = {
        (thing.part, thing.subject, thing.entry): [] for thing in report.checked
    }
    checked = set(named)
    for finding in worst_first(report.findings):
        named.setdefault((finding.part, finding.subject, finding.entry), []).append(finding)
    root = ElementTree.Element("testsuites", name=visible(report.title))
    suites: dict[str, ElementTree.Element] = {}
    for key, findings in named.items():
        part, subject, entry = key
        suite = suites.get(part)
        if suite is None:
            suite = suites[part] = ElementTree.SubElement(root, "testsuite", name=visible(part))
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=visible(f"{part}.{subject}"),
            name=visible(entry or subject),
        )
        if findings:
            _say(case, findings, skipped=key not in checked)
    for element in (root, *suites.values()):
        element.set("tests", str(sum(1 for _ in element.iter("testcase"))))
        for kind, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            element.set(count, str(sum(1 for _ in element.iter(kind))))
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _say(case: ElementTree.Element, findings: Sequence[Finding], *, skipped: bool) -> None:
    """What is said of one case; `findings` begin with the worst."""
    worst, text = findings[0].level, "\n".join(f"{f.level}: {f.text}" for f in findings)
    if worst == "note" and not skipped:
        ElementTree.SubElement(case, "system-out").text = visible(text)
        return
    kind = {"note": "skipped", "invalid": "error"}.get(worst, "failure")
    message = ElementTree.SubElement(case, kind, message=visible(findings[0].text), type=worst)
    message.text = visible(text)


FORMATS: dict[str, Callable[[Report], str]] = {
    "table": _table,
    "md": _markdown,
    "json": _json,
    "junit": _junit,
}


def count_levels(findings: Sequence[Finding]) -> dict[Level, int]:
    """How many different things have a finding of each level as their worst."""
    worst: dict[tuple[str, str, str | None], Level] = {}
    for finding in worst_first(findings):
        worst.setdefault((finding.part, finding.subject, finding.entry), finding.level)
    return {level: list(worst.values()).count(level) for level in LEVELS}
