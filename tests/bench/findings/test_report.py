"""Reports: what each format shows, and that none says less than the exit code."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console
from support.pinned import finding

from resblock_bench.bench.findings.findings import LEVELS, Finding, exit_code
from resblock_bench.bench.findings.report import (
    FORMATS,
    MARKDOWN_LIMIT,
    CheckedEntry,
    Document,
    Report,
    count_levels,
    destination,
    show,
    write,
)

CHECKED = [CheckedEntry(part="memory", subject="a", entry=entry) for entry in ("x", "y")]


def report_of(findings: Sequence[Finding], rows: int = 1) -> Report:
    return Report(
        title="check",
        columns=["part", "compared"],
        rows=[[f"memory|{number}", "2"] for number in range(rows)],
        checked=CHECKED,
        findings=list(findings),
        notes=["mend <it>"],
    )


def shown(report: Report, **options: object) -> str:
    file = io.StringIO()
    show(report, Console(file=file, width=140), **options)
    return file.getvalue()


def junit(report: Report) -> ElementTree.Element:
    return ElementTree.fromstring(FORMATS["junit"](report))


def many(count: int, text: str = "bytes 1 → 2") -> list[Finding]:
    return [finding("changed", entry=f"e{number}", text=text) for number in range(count)]


def test_json_is_the_whole_report() -> None:
    report = report_of(many(500))
    document = msgspec.json.decode(FORMATS["json"](report), type=Document)
    assert document.report == report
    assert document.exit_code == exit_code(report.findings) == 4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("entry", ["x", "elsewhere"])
def test_junit_fails_exactly_where_the_exit_code_does(level: str, entry: str) -> None:
    findings = [finding(level, entry=entry), finding("note", entry="y")]
    root = junit(report_of(findings))
    bad = [*root.iter("failure"), *root.iter("error")]
    kind = "error" if level == "invalid" else "failure"
    assert [one.tag for one in bad] == ([kind] if exit_code(findings) else [])
    assert len(list(root.iter("testcase"))) == (2 if entry == "x" else 3)
    assert root.get("failures") == str(len(list(root.iter("failure"))))
    assert root.get("errors") == str(len(list(root.iter("error"))))
    assert len(list(root.iter("skipped"))) == (level == "note" and entry == "elsewhere")


def test_junit_without_findings_passes() -> None:
    root = junit(report_of([]))
    assert [case.get("name") for case in root.iter("testcase")] == ["x", "y"]
    assert not [child for case in root.iter("testcase") for child in case]


def test_a_case_with_two_findings_is_one_case_with_the_worst() -> None:
    findings = [finding("regression", text="slower"), finding("wrong", text="far off")]
    (failure,) = junit(report_of(findings)).iter("failure")
    assert failure.get("type") == "wrong"
    assert failure.text == "wrong: far off\nregression: slower"
    counts = count_levels(findings)
    assert (counts["wrong"], counts["regression"]) == (1, 0)


def test_junit_survives_what_xml_cannot_hold() -> None:
    (error,) = junit(report_of([finding("invalid", text="\x1b[31m <boom> \ud800")])).iter("error")
    assert error.text == "invalid: [31m <boom> \ufffd"


def test_a_title_is_no_markup_and_fits_every_format() -> None:
    report = msgspec.structs.replace(report_of([]), title="[/] \x1b[31m \ud800")
    assert "[/] \x1b[31m" in shown(report)  # this console is a plain one
    assert junit(report).get("name") == "[/] [31m \ufffd"
    assert FORMATS["md"](report).startswith("### \\[/\\] \\[31m \ufffd")
    assert "[/] [31m \ufffd" in FORMATS["table"](report)


def test_markdown_is_a_table_and_a_list() -> None:
    text = FORMATS["md"](report_of([finding("note"), finding("wrong", text="a*b")]))
    lines = text.splitlines()
    assert "| part | compared |" in lines
    assert r"| memory\|0 | 2 |" in lines
    assert "<details>" not in text
    assert lines.index(r"- **wrong** memory a x: a\*b") < lines.index("- **note** memory a x: said")
    assert "mend &lt;it&gt;" in lines


def test_markdown_folds_many_findings() -> None:
    text = FORMATS["md"](report_of(many(11)))
    assert "<details><summary>11 findings</summary>\n\n- **changed**" in text
    assert text.count("- **changed**") == 11
    assert "more findings" not in text


@pytest.mark.parametrize(("findings", "rows"), [(3000, 1), (0, 9000), (3000, 9000)])
def test_markdown_fits_a_comment_and_says_what_was_cut(findings: int, rows: int) -> None:
    text = FORMATS["md"](report_of(many(findings), rows))
    assert 0.8 * MARKDOWN_LIMIT < len(text) < MARKDOWN_LIMIT
    cut = {what: int(count) for count, what in re.findall(r"… (\d+) more (\w+)", text)}
    assert text.count("- **changed**") == findings - cut.get("findings", 0)
    assert text.count(r"| memory\|") == rows - cut.get("rows", 0)
    assert text.endswith("mend &lt;it&gt;\n")


def test_a_terminal_shows_the_worst_and_counts_the_rest() -> None:
    report = report_of([*many(56, "bytes " * 40), finding("wrong", text="[red]")])
    text = shown(report)
    assert "… 37 more, see --format json" in text
    assert "wrong memory a x: [red]" in text
    assert max(map(len, text.splitlines())) <= 100
    assert " more, see" not in FORMATS["table"](report)
    assert FORMATS["table"](report).count("changed memory") == 56


def test_a_file_gets_the_format_and_the_terminal_the_table(tmp_path: Path) -> None:
    out, report = io.StringIO(), report_of(many(2))
    path = tmp_path / "report.xml"
    write(report, destination("junit", path), Console(file=out, width=100))
    assert path.read_text() == FORMATS["junit"](report)
    assert out.getvalue() == shown(report)
    alone = io.StringIO()
    write(report, destination("junit", None), Console(file=alone, width=20))
    assert alone.getvalue() == FORMATS["junit"](report)
