"""Rounds on real processes, and the baselines and calibrations that are made of them."""

import contextlib
import dataclasses
import io
import itertools
import math
import random
import re
import shutil
import statistics
from pathlib import Path

import msgspec
import pytest
from comparing import FAST, checked, plan_of
from gate_rates import spinning
from msgspec.structs import replace
from rich.console import Console

from resblock_bench.bench.compare import calibrate, compare, comparison
from resblock_bench.bench.compare import timing_baseline as baseline_timing
from resblock_bench.bench.compare.comparison import Comparison
from resblock_bench.bench.compare.machine_store import (
    calibration_file,
    history,
    machine_folder,
    write,
)
from resblock_bench.bench.compare.stored import read_baseline
from resblock_bench.bench.compare.verdict import DEFAULT_TOLERANCE, Verdict
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings.findings import exit_code
from resblock_bench.bench.gate import timing as check_timing
from resblock_bench.bench.lockstep import rounds
from resblock_bench.bench.lockstep.rounds import (
    Round,
    RoundError,
    RoundRule,
    Taken,
    measure_pair,
    take_bursts,
)
from resblock_bench.bench.lockstep.sides import Side, SideError
from resblock_bench.bench.lockstep.testbed import opened

THROTTLED = '{"t_s": 0, "throttled_us": {"heat": 0}}\n{"t_s": 1, "throttled_us": {"heat": 500}}\n'

A_ROUND = Round(
    base_ms=10.0,
    head_ms=10.0,
    log_ratio=0.0,
    base_samples=3,
    head_samples=3,
    disturbances=[],
    notes=[],
)
AMBIGUOUS = Verdict(
    word="AMBIGUOUS", ratio=1.0, low=0.9, high=1.1, detectable=0.1, reasons=["it is"]
)


@pytest.fixture(scope="module")
def bed(quiet):
    """Cells by name: those of a faulty implementation, or fused ones of batches 1 to 20."""
    faulty = [{"impl": impl} for impl in ("segfaulting", "wrong", "raising", "hanging")]
    fused = [{"impl": "fused", "batch": batch} for batch in range(1, 21)]
    plan = plan_of(*faulty, *fused)
    with opened(plan, {"A": (), "B": ()}, limit_s=8.0, telemetry=quiet) as found:
        yield found


def tasks_of(bed, impl):
    return [task for task in bed.tasks if task.cell.impl == impl]


def test_a_round_of_two_sides_and_of_one(bed):
    base, head = bed.sides
    assert base.code == head.code
    task = tasks_of(bed, "fused")[0]
    taken = measure_pair(task, bed.truth(task), base, head, FAST, random.Random(0))
    assert min(taken.base_samples, taken.head_samples) >= FAST.bursts
    assert taken.base_ms > 0 < taken.head_ms
    assert taken.disturbances == []
    (alone,), *_ = take_bursts(task, bed.truth(task), [head], FAST, random.Random(0))
    assert len(alone) == FAST.bursts


@pytest.mark.parametrize(
    ("impl", "status", "reason"),
    [
        ("segfaulting", "crashed", "killed by SIGSEGV"),
        ("wrong", "wrong", "above its limit"),
        ("raising", "failed", "illegal access [of memory]"),
        ("hanging", "timeout", "stopped after the time limit of 8"),
    ],
)
def test_what_goes_wrong_on_a_side_ends_the_round(bed, impl, status, reason):
    (task,) = tasks_of(bed, impl)
    with pytest.raises(RoundError) as caught:
        measure_pair(task, bed.truth(task), *bed.sides, FAST, random.Random(0))
    assert caught.value.status == status
    assert reason in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_side_that_starts_anew_is_the_same_code(bed, monkeypatch):
    task = tasks_of(bed, "fused")[0]
    base, head = bed.sides
    head.kill()
    monkeypatch.setattr(head, "code", "as it was before")
    with pytest.raises(RoundError, match="B: its files changed meanwhile") as caught:
        measure_pair(task, bed.truth(task), base, head, FAST, random.Random(0))
    assert (caught.value.status, caught.value.at_base) == ("crashed", False)


def test_nor_may_the_code_of_another_repository_change_before_a_new_start(bed, tmp_path):
    packages = tmp_path / "packages"
    shutil.copytree(Path(__file__).parents[1] / "faults", packages)
    task = tasks_of(bed, "fused")[0]
    task = replace(task, cell=replace(task.cell, impl="printing"))
    (tmp_path / "side").mkdir()
    side = Side("head", [packages], tmp_path / "side", limit_s=60.0, root=tmp_path)
    try:
        side.wait()
        side.open(task, bed.truth(task))
        side.end()
        (packages / "faulty_blocks.py").touch()
        side.kill()
        with pytest.raises(SideError, match=r"faulty_blocks\.py changed meanwhile"):
            side.open(task, bed.truth(task))
    finally:
        side.kill()


@pytest.mark.parametrize("number", [0, 1])
def test_whoever_fails_at_a_reading_is_blamed(bed, monkeypatch, number):
    task, side = tasks_of(bed, "fused")[0], bed.sides[number]

    def read():
        raise SideError(side, "crashed", "gone")

    monkeypatch.setattr(side, "read", read)
    with pytest.raises(RoundError, match=f"{side.name}: gone") as caught:
        measure_pair(task, bed.truth(task), *bed.sides, FAST, random.Random(0))
    assert caught.value.at_base == (number == 0)


def compared(bed, tasks, rule=FAST):
    draw = random.Random(0)

    def measure(task):
        return measure_pair(task, bed.truth(task), *bed.sides, rule, draw)

    items = Comparison(tasks, measure, DEFAULT_TOLERANCE, draw).carry_out()
    outcome = compare.Outcome("A/A", items, DEFAULT_TOLERANCE, [], [])
    return items, exit_code(compare.report_of(outcome).findings)


def test_no_change_twenty_times(bed, monkeypatch):
    monkeypatch.setattr(comparison, "STAGES", (3,))
    items, code = compared(bed, tasks_of(bed, "fused"))
    assert len(items) == 20
    assert [item.failed for item in items] == [None] * 20
    assert not {"SLOW", "FAST"} & {item.verdict.word for item in items}
    assert code in (0, 4)
    assert statistics.median(item.verdict.ratio for item in items) == pytest.approx(1, abs=0.1)


def test_five_per_cent_more_never_pass(bed, quiet, tmp_path, monkeypatch):
    """Really spun in. A loaded machine may leave it open; what it must not do is pass."""
    monkeypatch.setattr(comparison, "STAGES", (5,))
    sides = {name: spinning(tmp_path / name, share) for name, share in (("A", 0.0), ("B", 0.05))}
    plan = plan_of({"impl": "fused", "mode": "inference", "channels": 64, "out_channels": 64})
    rule = RoundRule(bursts=30, seconds=0.2)
    with opened(plan, sides, limit_s=60.0, telemetry=quiet) as slowed:
        items, code = compared(slowed, slowed.tasks, rule)
    assert [item.failed for item in items] == [None]
    assert items[0].verdict.word in ("SLOW", "AMBIGUOUS")
    assert code in (1, 4)


def test_a_throttled_machine_allows_no_verdict(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "STAGES", (5,))
    trace = tmp_path / "throttled.jsonl"
    trace.write_text(THROTTLED)
    task = msgspec.structs.replace(tasks_of(bed, "fused")[0], telemetry=str(trace))
    (item,), code = compared(bed, [task])
    assert (item.verdict.word, len(item.disturbed)) == ("AMBIGUOUS", 10)
    assert "heat held the clocks back" in item.verdict.reasons[0]
    assert code == 4


@pytest.mark.parametrize("sources", [(), (Path("src"),)])
def test_the_same_code_is_said_of_this_project_alone(bed, tmp_path, monkeypatch, sources):
    """Of another repository's code there is no digest."""
    none = dataclasses.replace(bed, tasks=[])
    monkeypatch.setattr(compare, "opened", lambda *a, **k: contextlib.nullcontext(none))
    request = compare.BaseRequest(
        base="main", plan=plan_of({}), start=tmp_path, timeout_s=8.0, sources=sources
    )
    outcome = compare.in_lockstep(request, {}, Console(quiet=True))
    assert any("the same code" in note for note in outcome.notes) == (not sources)


# Baselines and calibrations


@pytest.fixture
def stage(bed, tmp_path, monkeypatch):
    """Requests for two fused cells, measured on the sides that are there."""
    tasks = tasks_of(bed, "fused")[:2]
    alone = dataclasses.replace(bed, sides=bed.sides[:1], tasks=tasks)
    both = dataclasses.replace(bed, tasks=tasks)
    monkeypatch.setattr(baseline_timing, "_bed", lambda request: contextlib.nullcontext(alone))
    monkeypatch.setattr(calibrate, "opened", lambda *a, **k: contextlib.nullcontext(both))
    monkeypatch.setattr(comparison, "STAGES", (5,))
    monkeypatch.setattr(baseline_timing, "ROUNDS", 5)
    plan = plan_of({"impl": "fused", "batch": 1}, {"impl": "fused", "batch": 2})
    return baseline_timing.Request(plan=plan, start=tmp_path, rule=FAST)


def quiet_console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def steady(monkeypatch):
    """Samples of 10 ms, give or take a thousandth, whatever the machine does meanwhile."""
    count = itertools.count()

    def take(*arguments):
        return Taken([[[10.0 + 0.01 * (next(count) % 3)]]], [], [])

    monkeypatch.setattr(baseline_timing, "take_bursts", take)


def scaled(baseline, factor):
    series = [
        msgspec.structs.replace(one, rounds_ms=[factor * ms for ms in one.rounds_ms])
        for one in baseline.series
    ]
    return msgspec.structs.replace(baseline, series=series)


def test_a_baseline_is_measured_saved_and_kept(stage, bed, tmp_path):
    path = machine_folder(bed.environment.machine, tmp_path) / "timing.json"
    console = quiet_console()
    assert baseline_timing.save(stage, "the first", console) == 0
    first = read_baseline(path)
    assert [len(series.rounds_ms) for series in first.series] == [5, 5]
    assert baseline_timing.save(stage, "the second", console) == 0
    assert read_baseline(path).reason == "the second"
    assert [read_baseline(file).reason for file in history(path)] == ["the first"]
    assert "the first" in console.file.getvalue().splitlines()[-2]

    outcome = baseline_timing.against_baseline(stage, path, quiet_console())
    assert [item.failed for item in outcome.items] == [None, None]
    assert outcome.stored


@pytest.mark.parametrize(
    ("factor", "level", "code"),
    [(1.0, None, 0), (0.8, "regression", 1), (1.05, "note", 0), (1.2, "better", 4)],
    ids=["the same", "slower", "faster", "slack"],
)
def test_a_baseline_that_was(stage, bed, tmp_path, steady, factor, level, code):
    path = machine_folder(bed.environment.machine, tmp_path) / "timing.json"
    baseline_timing.save(stage, "all", quiet_console())
    write(path, scaled(read_baseline(path), factor))
    outcome = baseline_timing.against_baseline(stage, path, quiet_console())
    findings = compare.findings_of(outcome, "timing")
    assert {finding.level for finding in findings} == ({level} if level else set())
    assert exit_code(findings) == code


def test_a_baseline_of_fewer_cells_another_machine_or_contract(stage, bed, tmp_path, steady):
    path = machine_folder(bed.environment.machine, tmp_path) / "timing.json"
    baseline_timing.save(stage, "all", quiet_console())
    whole = read_baseline(path)
    write(path, msgspec.structs.replace(whole, series=whole.series[:1]))
    outcome = baseline_timing.against_baseline(stage, path, quiet_console())
    findings = compare.findings_of(outcome, "timing")
    assert "has no baseline in" in findings[0].text
    assert exit_code(findings) == 3


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda b: b.replace(b'"cpu":"', b'"cpu":"not '),
            r"cpu was not .* and is .*save a baseline",
        ),
        (lambda b: b.replace(b'"bursts":3', b'"bursts":7'), r"rounds' bursts was 7 and is 3"),
        (lambda b: b.replace(b'_version":1', b'_version":0'), r"is of schema 0"),
        (lambda b: b[:-9], r"is damaged"),
    ],
    ids=["another machine", "another rule", "an older schema", "damaged"],
)
def test_a_baseline_that_says_nothing_here(stage, bed, tmp_path, steady, here, spoil, text):
    baseline_timing.save(stage, "all", quiet_console())
    path = machine_folder(bed.environment.machine, tmp_path) / "timing.json"
    data = msgspec.json.encode(msgspec.json.decode(path.read_bytes()))
    assert spoil(data) != data
    path.write_bytes(spoil(data))
    found = checked(stage)
    assert [finding.level for finding in found.findings] == ["invalid"]
    assert re.search(text, found.findings[0].text)
    assert exit_code(found.findings) == 3


@pytest.fixture
def here(stage, bed, tmp_path, monkeypatch):
    """Where this machine's baseline is."""
    path = machine_folder(bed.environment.machine, tmp_path) / "timing.json"
    monkeypatch.setattr(check_timing, "baseline_file", lambda start: path)
    return path


def test_timing_without_calibration_is_no_pass(stage, steady, here):
    """The cells are the same, but by a tolerance that nobody measured here."""
    baseline_timing.save(stage, "here", quiet_console())
    found = checked(stage)
    assert [item.verdict.word for item in found.cells] == ["SAME", "SAME"]
    assert [finding.level for finding in found.findings] == ["inconclusive"]
    assert "was never calibrated" in found.findings[0].text
    assert exit_code(found.findings) == 4


def test_nor_is_it_with_a_stale_one(stage, bed, steady, here, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "measure_pair", lambda *arguments: A_ROUND)
    baseline_timing.save(stage, "here", quiet_console())
    request = calibrate.Request(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
    calibrate.carry_out(request, quiet_console())
    assert exit_code(checked(stage).findings) == 0
    path = calibration_file(bed.environment, "cpu", tmp_path)
    old = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**old, "saved_at": "2020-01-01T00:00:00Z"}))
    found = checked(stage)
    assert "is stale (it is" in found.findings[0].text
    assert exit_code(found.findings) == 4


def test_a_full_disk_leaves_what_was_measured(stage, steady, here, monkeypatch):
    baseline_timing.save(stage, "here", quiet_console())
    take, count = baseline_timing.take_bursts, itertools.count()

    def full(*arguments):
        if next(count) == 10:
            raise OSError(28, "No space left on device")
        return take(*arguments)

    monkeypatch.setattr(baseline_timing, "take_bursts", full)
    monkeypatch.setattr(comparison, "STAGES", (5, 9))
    monkeypatch.setattr(comparison, "judge", lambda es, t: [AMBIGUOUS for _ in es])
    found = checked(stage)
    assert [len(item.rounds) for item in found.cells] == [5, 5]
    text = "No space left on device: this is what the rounds taken so far say"
    assert any(text in finding.text for finding in found.findings)
    assert exit_code(found.findings) == 3


def test_what_could_not_be_stored_is_not_measured(stage, tmp_path, monkeypatch):
    (tmp_path / "results").write_text("a file")
    for module in (calibrate, baseline_timing):
        monkeypatch.setattr(module, "fill", lambda *arguments: pytest.fail("it was measured"))
    request = calibrate.Request(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
    with pytest.raises(UsageError, match="cannot be written"):
        calibrate.carry_out(request, quiet_console())
    with pytest.raises(UsageError, match="cannot be written"):
        baseline_timing.save(stage, "here", quiet_console())


def test_a_calibration_is_stored_and_used(stage, bed, tmp_path, monkeypatch):
    """Of rounds that were really taken; the noise of so few samples is not that of a machine."""
    taken = []

    def measure(*arguments):
        taken.append(measure_pair(*arguments))
        return msgspec.structs.replace(taken[-1], log_ratio=0.004)

    monkeypatch.setattr(calibrate, "measure_pair", measure)
    request = calibrate.Request(plan=stage.plan, start=tmp_path, rounds=6, rule=FAST)
    console = quiet_console()
    assert calibrate.carry_out(request, console) == 0
    assert "stored in" in console.file.getvalue()
    assert len(taken) == 12
    found, note = compare.usable_calibration(bed.environment, "cpu", FAST, tmp_path)
    assert note is None
    assert [noise.rounds for noise in found.cells] == [6, 6]
    assert found.tolerance.relative == 0.01
    other = tasks_of(bed, "fused")[2]
    assert "1 of 1 cells were not calibrated" in compare.of_others(found, [other])[0]
    assert compare.of_others(found, bed.tasks[:0]) == []
    _, note = compare.usable_calibration(bed.environment, "cpu", RoundRule(), tmp_path)
    assert "is stale (its rounds were taken in another way)" in note
    _, note = compare.usable_calibration(bed.environment, "cuda", FAST, tmp_path)
    assert "was never calibrated" in note


def test_a_throttled_machine_is_neither_calibrated_nor_a_baseline(stage, bed, tmp_path):
    trace = tmp_path / "throttled.jsonl"
    trace.write_text(THROTTLED)
    with pytest.MonkeyPatch.context() as patch:
        throttled = [
            msgspec.structs.replace(task, telemetry=str(trace)) for task in tasks_of(bed, "fused")
        ][:1]
        both = dataclasses.replace(bed, tasks=throttled)
        alone = dataclasses.replace(both, sides=bed.sides[:1])
        patch.setattr(calibrate, "opened", lambda *a, **k: contextlib.nullcontext(both))
        patch.setattr(baseline_timing, "_bed", lambda request: contextlib.nullcontext(alone))
        request = calibrate.Request(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
        with pytest.raises(InvalidError, match=r"cannot be calibrated: 10 of 10 rounds were dist"):
            calibrate.carry_out(request, quiet_console())
        with pytest.raises(InvalidError, match=r"is no baseline: 10 of 10 rounds were dist"):
            baseline_timing.save(stage, "hot", quiet_console())
    assert not list(tmp_path.rglob("*.json"))


class Failing:
    """A side whose cell is wrong."""

    def __init__(self, name):
        self.name = name

    def open(self, task, truth):
        raise SideError(self, "wrong", "is wrong")

    def abandon(self):
        pass


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_head_is_told_even_where_the_base_is_wrong(seed):
    sides = Failing("base"), Failing("head")
    with pytest.raises(RoundError, match="head: is wrong") as error:
        take_bursts(None, Path(), sides, FAST, random.Random(seed))
    assert not error.value.at_base


def test_a_slower_side_is_not_slower_still_for_its_fewer_samples(monkeypatch):
    base, head = [1.2, 1.0, 1.0, 1.0], [1.05 * ms for ms in (1.2, 1.0)]
    taken = Taken([[base] * 3, [head] * 3], [], [])
    monkeypatch.setattr(rounds, "take_bursts", lambda *arguments: taken)
    found = measure_pair(None, None, None, None, FAST, None)
    assert found.log_ratio == pytest.approx(math.log(1.05))
    assert (found.base_samples, found.head_samples) == (12, 6)
