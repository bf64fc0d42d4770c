"""The static gate notices what was made worse on purpose, and says nothing where nothing was."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from rich.console import Console

from resblock_bench.bench import check_static, kernel_cases, pins
from resblock_bench.bench.check_static import PART
from resblock_bench.bench.findings import Finding
from resblock_bench.bench.pins import Entries, Found, PinFile

COMMITTED = Path(__file__).parents[2] / pins.PINS


def point(value: str, name: str = "seeded") -> metadata.EntryPoint:
    return metadata.EntryPoint(name, value, kernel_cases.GROUP)


@pytest.fixture(scope="module")
def found() -> Found:
    """The cases of static_kernels.py, measured as those of this project are."""
    items, wrong = check_static.case_items([point("static_kernels:cases")], [90])
    assert not wrong
    return check_static.measure_items(items, Console(quiet=True))


def pinned(root: Path, **subjects: Entries) -> dict[str, PinFile]:
    pins.write_pins(root, PART, subjects, "a test", None)
    return pins.read_pins(root, PART.name)


def judged(root: Path, found: Found, subject: str) -> list[Finding]:
    """What is said of one case where the good one is what is expected."""
    expected = pinned(root, **{subject: found.subjects["good"]})
    own = [finding for finding in found.findings if finding.subject == subject]
    return pins.judge(PART, expected, Found({subject: found.subjects[subject]}, own))


def test_nothing_changed(found: Found, tmp_path: Path) -> None:
    assert judged(tmp_path, found, "same") == []
    expected = pinned(tmp_path, same=found.subjects["good"])
    same = Found({"same": found.subjects["same"]})
    text = "1 of 1 kernels have exactly the pinned machine code; no timing run is needed"
    assert check_static.summary(expected, same) == text
    longer = Found({"same": found.subjects["longer"]})
    assert check_static.summary(expected, longer).startswith("0 of 1")
    assert check_static.summary({}, same).endswith("1 do not")


@pytest.mark.parametrize(
    ("subject", "entry", "level", "texts"),
    [
        ("narrow", "sm_90", "regression", ["load_bits 128 → 32", "store_bits 128 → 32"]),
        ("narrow", "traffic", "regression", ["sector_efficiency 1 → "]),
        ("spilling", "sm_90", "regression", ["spill_bytes 0 → "]),
        # Bytes read and written for an element: the second read is of what was touched before.
        ("reading-twice", "traffic", "regression", ["requested 8 → 12"]),
        ("longer", "sm_90", "changed", ["sass_hash", "instructions"]),
    ],
)
def test_seeded_changes(
    found: Found, tmp_path: Path, subject: str, entry: str, level: str, texts: list[str]
) -> None:
    said = {finding.entry: finding for finding in judged(tmp_path, found, subject)}
    assert said[entry].level == level
    for text in texts:
        assert text in said[entry].text


def test_the_reverse_of_a_regression_is_better(found: Found, tmp_path: Path) -> None:
    """A pin with slack would let the next regression pass."""
    expected = pinned(tmp_path, case=found.subjects["reading-twice"])
    said = pins.judge(PART, expected, Found({"case": found.subjects["good"]}))
    assert {finding.entry: finding.level for finding in said}["traffic"] == "better"


def test_an_instruction_more_moves_no_bytes(found: Found, tmp_path: Path) -> None:
    assert {finding.level for finding in judged(tmp_path, found, "longer")} == {"changed"}


def test_shared_memory_above_the_limit_needs_no_pin(found: Found) -> None:
    (said,) = [finding for finding in found.findings if finding.subject == "much-shared"]
    assert (said.level, said.entry) == ("regression", "sm_90")
    assert "232,448" in said.text  # 227 KiB


@pytest.mark.parametrize(
    ("subject", "entries", "text"),
    [
        ("crashing", ["sm_90"], "could not be compiled: its process died (SIGSEGV)"),
        ("broken", ["traffic", "sm_90"], "broken on purpose"),
    ],
)
def test_a_failure_is_its_own_alone(
    found: Found, tmp_path: Path, subject: str, entries: list[str], text: str
) -> None:
    """The cases after it are judged, above; of what failed nothing else is said."""
    said = judged(tmp_path, found, subject)
    assert [finding.entry for finding in said] == entries
    assert {finding.level for finding in said} == {"invalid"}
    assert all(text in finding.text for finding in said)


def test_pins_that_say_nothing(
    found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Found({"good": found.subjects["good"]})
    (said,) = pins.judge(PART, {}, good)
    assert (said.level, said.text) == ("invalid", "has no pin: save one")
    expected = pinned(tmp_path, good=found.subjects["good"])
    assert pins.judge(PART, expected, good) == []
    monkeypatch.setattr(check_static.metadata, "version", lambda name: "0.0")
    (said,) = pins.judge(PART, expected, good)
    assert said.level == "invalid" and "here is 0.0" in said.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("static_kernels:absent", "AttributeError"),
        ("no_such_package:cases", "No module named"),
        ("static_kernels:NUMBER", "no function that returns KernelCases"),
        ("static_kernels:numbers", "offers a int, not a KernelCase"),
        ("static_kernels:unnameable", "'no/name' is no name"),
        ("static_kernels:twins", "two of its cases"),
    ],
)
def test_bad_registrations_are_named(value: str, text: str) -> None:
    items, (said,) = check_static.case_items([point(value)], [90])
    assert not items
    assert (said.level, said.subject) == ("invalid", "seeded")
    assert text in said.text and value in said.text and "mend or uninstall" in said.text


def test_registered_cases_are_measured_with_the_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages with a case of one name: the first has it."""
    measured: list[Any] = []

    def measure_items(items: Any, console: Console) -> Found:
        measured.extend(items)
        return Found()

    two = [point("static_kernels:cases"), point("static_kernels:cases", "other")]
    monkeypatch.setattr(kernel_cases, "registered", lambda: two)
    monkeypatch.setattr(check_static, "measure_items", measure_items)
    said = PART.measure(Console(quiet=True)).findings
    assert {item.subject for item in measured} > {"good", "same"}
    assert len({item.job for item in measured}) == len(measured)
    assert "rename one" in said[0].text and {finding.level for finding in said} == {"invalid"}


def test_the_pins_are_those_of_the_configuration() -> None:
    """Every tier of both layouts is among them, and each entry once."""
    items = list(check_static.norm_items(check_static.norms()))
    expected: dict[str, list[str]] = {}
    for item in items:
        expected.setdefault(item.subject, []).append(item.entry)
    committed = pins.read_pins(COMMITTED, PART.name)
    assert {subject: list(pin.entries) for subject, pin in committed.items()} == {
        subject: expected[subject] for subject in sorted(expected)
    }
    for pin in committed.values():
        for figures in pin.entries.values():
            assert figures.keys() <= PART.rules.keys()
            assert figures.get("spill_bytes", 0) == 0
    launched = {
        (item.job.arguments[0].layout, item.job.arguments[1], item.job.arguments[2].tier)
        for item in items
    }
    for tier in "ABC":
        for layout in ("nchw", "nhwc"):
            assert (layout, "forward", tier) in launched
            assert (layout, "backward", tier) in launched
    assert ("nhwc", "backward", "D") in launched


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from resblock_bench.kernels import dispatch

    assert PART.cannot() is None
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert "install triton" in (PART.cannot() or "")
