"""The static gate notices what was made worse on purpose, and says nothing where nothing was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from rich.console import Console
from support.kept_workers import KeptWorkers

from resblock_bench.bench.compiled import cases as kernel_cases
from resblock_bench.bench.gate import check, pins
from resblock_bench.bench.gate import static as check_static
from resblock_bench.bench.gate.pins import Entries, Found, PinFile
from resblock_bench.bench.gate.static import PART
from resblock_bench.bench.machine import workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_workers")]

ROOT = Path(__file__).parents[3]


def point(value: str, name: str = "seeded") -> metadata.EntryPoint:
    return metadata.EntryPoint(name, value, kernel_cases.GROUP)


@pytest.fixture(scope="module")
def found(kept_workers: KeptWorkers) -> Found:
    """The cases of static_kernels.py, measured as those of another package are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(workers, "run", kept_workers.run)
        items, wrong = check_static.case_items([point("support.static_kernels:cases")])
        assert not wrong
        return check_static.measure_items(items, Console(quiet=True))


def pinned(root: Path, **subjects: Entries) -> dict[str, PinFile]:
    pins.write_pins(root, PART, subjects, "a test", None)
    return pins.read_pins(root, PART.name)


@pytest.fixture
def checked(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Found
) -> Callable[..., tuple[int, dict[str | None, dict[str, str]]]]:
    """`check --static` of one case where another one is what is expected: the exit code, and the
    findings by entry."""

    def run(subject: str, expected: str = "good") -> tuple[int, dict[str | None, dict[str, str]]]:
        pinned(tmp_path, **{subject: found.subjects[expected]})
        own = [finding for finding in found.findings if finding.subject == subject]
        here = Found({subject: found.subjects[subject]}, own)
        part = dataclasses.replace(PART, measure=lambda console: here)
        monkeypatch.setattr(check, "pinned_parts", lambda: {PART.name: part})
        done = run_cli("check", "--static", "--pins", tmp_path, "--format", "json")
        said = json.loads(done.out)["report"]["findings"]
        return done.code, {finding["entry"]: finding for finding in said}

    return run


def test_nothing_changed(checked: Callable, found: Found, tmp_path: Path) -> None:
    assert checked("same") == (0, {})
    expected = pinned(tmp_path, same=found.subjects["good"])
    same = Found({"same": found.subjects["same"]})
    text = "1 of 1 kernels have exactly the pinned machine code and launch; no timing run is needed"
    assert check_static.summary(expected, same) == text
    longer = Found({"same": found.subjects["longer"]})
    assert check_static.summary(expected, longer).startswith("0 of 1")
    assert check_static.summary({}, same).endswith("1 do not")
    # What crashed is not as pinned.
    assert check_static.summary(expected, Found()).endswith("1 do not")
    assert "timing" not in check_static.summary({}, Found())


@pytest.mark.parametrize(
    ("subject", "expected", "entry", "code", "texts"),
    [
        ("narrow", "good", "sm_90", 1, ["load_bits 128 → 32", "store_bits 128 → 32"]),
        ("narrow", "good", "traffic", 1, ["sector_efficiency 1 → "]),
        # One of two loads; the other and the store are as wide as before.
        ("pair-narrow", "pair", "sm_90", 1, ["load_bits 128 → "]),
        ("spilling", "good", "sm_90", 1, ["spill_bytes 0 → "]),
        # Bytes read and written for an element: the second read is of what was touched before.
        ("reading-twice", "good", "traffic", 1, ["requested 8 → 12"]),
        ("longer", "good", "sm_90", 4, ["sass_hash", "instructions"]),
        ("once", "good", "sm_90", 4, ["programs 2 → 1"]),
        # A pin with slack would let the next regression pass.
        ("good", "reading-twice", "traffic", 4, ["requested 12 → 8"]),
        ("much-shared", "much-shared", "sm_90", 1, ["232,448"]),  # 227 KiB
        ("crashing", "good", "sm_90", 3, ["could not be compiled: killed by SIGSEGV"]),
        ("broken", "good", "traffic", 3, ["could not be interpreted", "broken on purpose"]),
        ("broken", "good", "sm_90", 3, ["could not be compiled", "broken on purpose"]),
        ("autotuned", "good", "sm_90", 3, ["pass its kernel.fn, with one configuration"]),
        ("idle", "idle", "traffic", 3, ["moves no bytes"]),
    ],
)
def test_seeded_changes(
    checked: Callable, subject: str, expected: str, entry: str, code: int, texts: list[str]
) -> None:
    found_code, said = checked(subject, expected)
    assert found_code == code
    assert (
        said[entry]["level"] in {1: ["regression"], 3: ["invalid"], 4: ["changed", "better"]}[code]
    )
    for text in texts:
        assert text in said[entry]["text"]


@pytest.mark.parametrize("seeded", ["launch", "kernel"])
def test_a_launch_more_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seeded: str
) -> None:
    """Of the same kernel, or of one more: both are host time that no machine code shows."""
    from resblock_bench.bench.compiled import norms as norm_cost

    norm = check_static.norms()[0]
    subject = check_static.norm_name(norm)

    def measured() -> dict[str, dict[str, Any]]:
        """Of a call's entries only the launches; nothing is compiled."""
        entries = {}
        for item in check_static.norm_items([norm]):
            if item.job.interpret:
                continue
            *call, _, kernel = item.job.arguments
            entries[item.entry] = {"launches": len(norm_cost.kernels_of(*call)[kernel])}
        return entries

    before = pinned(tmp_path, **{subject: measured()})
    original = norm_cost.launches.backward

    def backward(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        if seeded == "launch":
            original(*arguments, **options)
        else:
            norm_cost.launches.residual(*arguments[:2], None, 1.0)
        return found

    monkeypatch.setattr(norm_cost.launches, "backward", backward)
    findings = pins.judge(PART, before, Found({subject: measured()}))
    levels = {"launch": "regression", "kernel": "invalid"}
    texts = {"launch": "launches 1 → 2", "kernel": "has no pin"}
    assert findings and {finding.level for finding in findings} == {levels[seeded]}
    for finding in findings:
        assert texts[seeded] in finding.text
        assert finding.entry is not None and finding.entry.startswith("backward sm_")


def test_an_instruction_more_moves_no_bytes(checked: Callable) -> None:
    _, said = checked("longer")
    assert {finding["level"] for finding in said.values()} == {"changed"}


def test_a_failure_is_its_own_alone(checked: Callable) -> None:
    """The cases after it are judged, above; of what failed nothing else is said."""
    _, said = checked("crashing")
    assert list(said) == ["sm_90"]


def test_pins_that_say_nothing(
    found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Found({"good": found.subjects["good"]})
    (said,) = pins.judge(PART, {}, good)
    assert (said.level, said.text) == ("invalid", "has no pin: save one")
    expected = pinned(tmp_path, good=found.subjects["good"])
    assert pins.judge(PART, expected, good) == []
    monkeypatch.setattr("triton.__version__", "0.0")
    (said,) = pins.judge(PART, expected, good)
    assert said.level == "invalid" and "here is 0.0" in said.text


def test_bad_registrations_are_named() -> None:
    wrong = {
        "support.static_kernels:absent": "AttributeError",
        "no_such_package:cases": "No module named",
        "support.static_kernels:NUMBER": "no function that returns KernelCases",
        "support.static_kernels:numbers": "offers a int, not a KernelCase",
        "support.static_kernels:unnameable": "'no/name' is no name",
        "support.static_kernels:twins": "two of its cases",
        "support.process_functions:leave": "its process ended with code 0",
    }
    items, said = check_static.case_items([point(value, value) for value in wrong])
    assert not items
    assert [finding.subject for finding in said] == list(wrong)
    for finding, (value, text) in zip(said, wrong.items(), strict=True):
        assert finding.level == "invalid"
        assert text in finding.text and value in finding.text
        assert "mend or uninstall" in finding.text


@pytest.fixture
def items_measured(monkeypatch: pytest.MonkeyPatch) -> list[check_static.Item]:
    """What would be measured, with two packages installed that have cases of the same names."""
    measured: list[check_static.Item] = []

    def measure_items(items: Any, console: Console) -> Found:
        measured.extend(items)
        return Found()

    two = [point("support.static_kernels:cases"), point("support.static_kernels:cases", "other")]
    monkeypatch.setattr(kernel_cases, "registered", lambda: two)
    monkeypatch.setattr(check_static, "measure_items", measure_items)
    return measured


def test_another_repository_is_asked_for_its_own_kernels(
    items_measured: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two packages with a case of one name: the first has it."""
    monkeypatch.chdir(tmp_path)
    said = PART.measure(Console(quiet=True)).findings
    subjects = {item.subject for item in items_measured}
    assert subjects > {"good", "same"}
    assert not subjects & {check_static.norm_name(norm) for norm in check_static.norms()}
    assert len({item.job for item in items_measured}) == len(items_measured)
    assert "rename one" in said[0].text and {finding.level for finding in said} == {"invalid"}


def test_without_registered_kernels_nothing_passes(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as where the package was not installed anew after it had named its entry point."""
    monkeypatch.setattr(kernel_cases, "registered", list)
    monkeypatch.chdir(tmp_path)
    done = run_cli("check")
    assert done.code == 3
    assert "no installed package offers kernels by an entry point" in " ".join(done.out.split())


def test_this_project_is_asked_for_its_own_alone(
    items_measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert not PART.measure(Console(quiet=True)).findings
    subjects = {item.subject for item in items_measured}
    assert subjects == set(pins.read_pins(ROOT / pins.PINS, PART.name))


def test_the_pins_are_those_of_the_configuration() -> None:
    """Every tier of both layouts is among them, and each entry once."""
    items = list(check_static.norm_items(check_static.norms()))
    names = {check_static.norm_name(norm) for norm in check_static.norms()}
    expected: dict[str, list[str]] = {}
    for item in items:
        expected.setdefault(item.subject, []).append(item.entry)
    committed = pins.read_pins(ROOT / pins.PINS, PART.name)
    assert names < committed.keys()
    assert {subject: list(committed[subject].entries) for subject in names} == expected
    for pin in committed.values():
        for figures in pin.entries.values():
            assert figures.keys() <= PART.criteria.keys()
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
