"""The memory and accuracy parts: a seeded change in the kernels is found, and how it is called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import process_functions

from resblock_bench.bench.findings.findings import exit_code
from resblock_bench.bench.gate import accuracy as check_accuracy
from resblock_bench.bench.gate import accuracy_cases, check
from resblock_bench.bench.gate import memory as check_memory
from resblock_bench.bench.gate.accuracy_cases import AccuracyCase
from resblock_bench.bench.gate.pins import PINS, Found, PinnedPart, read_pins
from resblock_bench.bench.machine import answers
from resblock_bench.bench.measure.predict_memory import predict_memory
from resblock_bench.kernels import aten, blocks
from resblock_bench.kernels.spec import Spec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TINY = AccuracyCase(None, "fp32", "nchw", "scale_shift", 0.0, 2, 8)


@pytest.fixture
def saved_then_checked(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[PinnedPart, Callable[[], None]], tuple[int, str]]:
    """Save a part's figures, change something, and check: exit code and output."""

    def run(part: PinnedPart, change: Callable[[], None]) -> tuple[int, str]:
        monkeypatch.setattr(check, "pinned_parts", lambda: {part.name: part})
        monkeypatch.setattr("resblock_bench.bench.gate.baseline.pinned_parts", check.pinned_parts)
        flags = [f"--{part.name}", "--pins", tmp_path]
        assert run_cli("baseline", "save", *flags, "--reason", "as it stands").code == 0
        assert run_cli("check", *flags).code == 0
        change()
        done = run_cli("check", *flags)
        return done.code, " ".join(done.out.split())

    return run


@pytest.fixture
def memory_part(make_cell: Callable) -> PinnedPart:
    """The part on two tiny cells."""
    common = {"model": "tiny", "impl": "fused"}
    cells = [make_cell(**common), make_cell(**common, checkpoint="full")]

    def measure(console: object) -> Found:
        """In this process, so that a test may spoil the block."""
        found = Found()
        for cell in cells:
            check_memory.enter(found, cell, "aten", predict_memory(cell))
        return found

    return dataclasses.replace(check_memory.PART, measure=measure)


def quiet() -> Console:
    return Console(quiet=True)


def keep_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused block that saves another activation: square keeps what it is given."""
    operator = blocks.group_norm_silu
    monkeypatch.setattr(blocks, "group_norm_silu", lambda *a, **k: operator(*a, **k).square())


def test_an_extra_saved_activation_is_a_regression(
    saved_then_checked: Callable, memory_part: PinnedPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = saved_then_checked(memory_part, lambda: keep_one_more(monkeypatch))
    assert code == 1
    assert "regression memory tiny 32 8² b2 fp32 nchw train fused/none: peak_above" in out
    before, after = re.search(r"saved_for_backward_bytes ([\d,]+) → ([\d,]+)", out).groups()
    # Two norms, each keeping 2·32·8·8 floats more.
    more = int(after.replace(",", "")) - int(before.replace(",", ""))
    assert more == 2 * 4 * 2 * 32 * 8 * 8


def test_a_lower_peak_asks_to_be_saved(
    saved_then_checked: Callable, memory_part: PinnedPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as hungry:
        keep_one_more(hungry)
        code, out = saved_then_checked(memory_part, hungry.undo)
    assert code == 4
    assert "better memory tiny" in out
    assert "baseline save --memory --pins" in out


@pytest.mark.usefixtures("shared_workers")
def test_each_path_in_a_process_and_one_that_crashes(
    make_cell: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"model": "tiny", "impl": "fused"}
    cells = [make_cell(**common), make_cell(**common, checkpoint="full")]
    none, full = "32 8² b2 fp32 nchw train fused/none", "32 8² b2 fp32 nchw train fused/full"
    before = check_memory.measure_cells(cells[:1], quiet())
    assert list(before.subjects["tiny"]) == [none, f"{none} in Triton"]

    monkeypatch.setattr(check_memory, "predict", process_functions.predict_or_crash)
    found = check_memory.measure_cells(cells, quiet())
    assert found.subjects == before.subjects
    assert [one.entry for one in found.findings] == [full, f"{full} in Triton"]
    assert {one.level for one in found.findings} == {"invalid"}
    assert "crashed: RuntimeError: boom" in found.findings[0].text

    monkeypatch.setattr(check_memory, "predict", process_functions.predict_one_more)
    found = check_memory.measure_cells(cells[:1], quiet())
    for entry, figures in before.subjects["tiny"].items():
        more = found.subjects["tiny"][entry]["saved_for_backward_bytes"]
        assert more - figures["saved_for_backward_bytes"] == 2 * 4 * 2 * 32 * 8 * 8


@pytest.mark.usefixtures("shared_workers")
def test_the_pins_of_memory_hold() -> None:
    pins = read_pins(ROOT / PINS, "memory")
    cells = list(check_memory.cells())
    picked = [cell for cell in cells if cell.checkpoint == "selective"][::3]
    found = check_memory.measure_cells(picked, quiet())
    assert not found.findings
    for subject, entries in found.subjects.items():
        if pins[subject].made_with != check_memory.PART.made_with():
            pytest.skip(f"pinned with {pins[subject].made_with}")
        for entry, figures in entries.items():
            assert pins[subject].entries[entry] == figures, f"{subject} {entry}"
    assert sum(len(pin.entries) for pin in pins.values()) == len(list(check_memory.items(cells)))


@pytest.mark.usefixtures("shared_workers")
def test_the_statistics_of_the_kernels_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(check_accuracy, "_SAME_EVERYWHERE", None)
    about_zero = AccuracyCase("A", "fp32", "nchw", "scale_shift", 0.0, 1, 8)
    cases = [about_zero, about_zero._replace(mean=1000.0)]
    assert not check_accuracy.measure_cases(cases, quiet()).findings
    monkeypatch.setattr(check_accuracy, "measure", process_functions.measure_naively)
    (said,) = check_accuracy.measure_cases(cases, quiet()).findings
    assert (said.level, said.entry) == ("wrong", cases[1].name)
    assert exit_code([said]) == 5


def in_this_process(cases: Sequence[AccuracyCase]) -> PinnedPart:
    """The accuracy part without processes of its own, so that a test may spoil the kernels."""

    def measure(console: object) -> Found:
        found = Found()
        for case in cases:
            check_accuracy.enter(found, case, accuracy_cases.measure(case))
        return found

    return dataclasses.replace(check_accuracy.PART, measure=measure)


def naive_group_norm(
    h: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, spec: Spec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E[x²] − μ², of a call that modulates afterwards."""
    assert weight is None and bias is None
    rows = h.reshape(len(h), spec.num_groups, -1)
    mean = rows.mean(2, keepdim=True)
    rstd = (rows.square().mean(2, keepdim=True) - mean.square() + spec.eps).rsqrt()
    return ((rows - mean) * rstd).view_as(h), mean.squeeze(2), rstd.squeeze(2)


@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_statistics_that_cancel_are_wrong(
    saved_then_checked: Callable, monkeypatch: pytest.MonkeyPatch, mean: float
) -> None:
    part = in_this_process([TINY._replace(mean=mean), TINY])
    code, out = saved_then_checked(
        part, lambda: monkeypatch.setattr(aten, "_group_norm", naive_group_norm)
    )
    assert code == 5
    assert f"wrong accuracy aten 2×8² fp32 nchw scale_shift mean {mean:g}σ: y is" in out
    assert f"regression accuracy aten 2×8² fp32 nchw scale_shift mean {mean:g}σ" in out
    # Which inputs about zero would not have shown.
    assert "wrong accuracy aten 2×8² fp32 nchw scale_shift:" not in out


def test_an_error_within_the_limit_that_grew_is_a_regression(
    saved_then_checked: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = aten.forward

    def rougher(*arguments: object) -> torch.Tensor:
        return forward(*arguments) * (1 + 1.5e-7)

    code, out = saved_then_checked(
        in_this_process([TINY]), lambda: monkeypatch.setattr(aten, "forward", rougher)
    )
    assert code == 1
    assert "y error" in out


def test_the_figures_of_a_case() -> None:
    found = Found()
    errors = accuracy_cases.Errors({"y": 3.00049e-7}, {"y": 2e-7}, {"y": 4e-7})
    check_accuracy.enter(found, TINY, errors)
    assert found.subjects == {"aten": {TINY.name: {"y error": 3e-7, "y / eager": 1.5}}}
    assert not found.findings


def test_nan_is_invalid(saved_then_checked: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = aten.forward

    def poisoned(*arguments: object) -> torch.Tensor:
        y = forward(*arguments)
        y[0, 0, 0, 0] = torch.nan
        return y

    code, out = saved_then_checked(
        in_this_process([TINY]), lambda: monkeypatch.setattr(aten, "forward", poisoned)
    )
    assert code == 3
    assert "→ not a number" in out


def test_a_gradient_of_another_sign_is_wrong(
    saved_then_checked: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = aten.backward

    def mirrored(*arguments: object) -> tuple:
        dx, sums = backward(*arguments)
        return -dx, sums

    code, out = saved_then_checked(
        in_this_process([TINY]), lambda: monkeypatch.setattr(aten, "backward", mirrored)
    )
    assert code == 5
    assert "dx is 2 from float64" in out


TWO_WAYS = [AccuracyCase("A", "fp32", "nhwc", "add", 100.0, 1, 4), TINY._replace(size=4)]


@pytest.mark.usefixtures("shared_workers")
def test_interpreted_and_in_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(check_accuracy, "_SAME_EVERYWHERE", None)
    found = check_accuracy.measure_cases(TWO_WAYS, quiet())
    assert not found.findings
    figures = found.subjects["triton-A"][TWO_WAYS[0].name]
    assert set(figures) <= set(check_accuracy.PART.criteria)
    assert 0 < figures["y error"] < 1e-4
    assert list(found.subjects["aten"]) == [TWO_WAYS[1].name]


def test_a_worker_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "usable_cpus", lambda: 1)
    monkeypatch.setattr(check_accuracy, "measure", process_functions.die)
    found = check_accuracy.measure_cases(TWO_WAYS, quiet())
    assert [one.level for one in found.findings] == ["invalid", "invalid"]
    assert all("its process ended with" in one.text for one in found.findings)
    assert not found.subjects


def test_the_pins_of_accuracy_are_those_of_the_cases() -> None:
    pins = read_pins(ROOT / PINS, "accuracy")
    names = {(check_accuracy.subject_of(case), case.name) for case in check_accuracy.cases()}
    assert {(pin.subject, entry) for pin in pins.values() for entry in pin.entries} == names
    for pin in pins.values():
        for figures in pin.entries.values():
            assert set(figures) <= set(check_accuracy.PART.criteria)


def test_every_kind_of_block_and_path_is_there() -> None:
    cells, cases = list(check_memory.cells()), list(check_accuracy.cases())
    assert {cell.updown for cell in cells} == {"none", "up", "down"}
    assert {cell.conditioning for cell in cells} == {"scale_shift", "add"}
    assert {cell.dtype for cell in cells} == {"fp32", "bf16"}
    assert {cell.layout for cell in cells} == {"nchw", "nhwc"}
    assert any(cell.channels != cell.out_channels for cell in cells)
    assert any(cell.dropout for cell in cells)
    for tier in "ABCD":
        taken = [case for case in cases if case.tier == tier]
        assert {case.layout for case in taken} == {"nchw", "nhwc"}
        assert {case.conditioning for case in taken} == {"scale_shift", "add"}
        assert any(case.mean >= 100 for case in taken)
