"""Rounds on real processes, and the calibrations and verdicts that are made of them."""

import contextlib
import dataclasses
import io
import itertools
import math
import random
import statistics
import types
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console
from support.comparing import FAST, a_round, checked, plan_of
from support.parties import Scripted

from resblock_bench.bench.compare import calibrate, calibration, compare, comparison
from resblock_bench.bench.compare.calibration import calibration_file
from resblock_bench.bench.compare.comparison import Comparison
from resblock_bench.bench.compare.verdict import DEFAULT_TOLERANCE, Verdict
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings.findings import exit_code
from resblock_bench.bench.gate import timing as check_timing
from resblock_bench.bench.lockstep import testbed
from resblock_bench.bench.lockstep.party import Ended
from resblock_bench.bench.lockstep.rounds import RoundError, RoundRule, measure_pair
from resblock_bench.bench.lockstep.testbed import Side, opened
from resblock_bench.bench.measure.cell import row_of

pytestmark = pytest.mark.slow

FAULTS = Path(__file__).parents[2] / "faults"
ENDED = types.SimpleNamespace(up=False)
"""The server of a side, which was killed."""
AMBIGUOUS = Verdict(
    word="AMBIGUOUS", ratio=1.0, low=0.9, high=1.1, detectable=0.1, reasons=["it is"]
)


@pytest.fixture(scope="module")
def bed():
    """Cells by name: those of a faulty implementation, or good ones of batches 1 to 8."""
    impls = ("segfaulting", "wrong", "raising", "hanging", "overheated")
    faulty = [{"impl": impl} for impl in impls]
    good = [{"impl": "undisturbed", "batch": batch} for batch in range(1, 9)]
    plan = plan_of(*faulty, *good)
    with opened(plan, {"A": (), "B": ()}, limit_s=8.0) as found:
        yield found


def tasks_of(bed, impl):
    return [task for task in bed.tasks if task.cell.impl == impl]


def test_a_round_of_two_sides(bed):
    base, head = bed.sides
    assert base.code == head.code
    task = tasks_of(bed, "undisturbed")[0]
    taken = measure_pair(task, base, head, FAST, random.Random(0))
    assert min(taken.base_samples, taken.head_samples) >= FAST.bursts
    assert taken.base_ms > 0 < taken.head_ms
    assert taken.disturbances == []


@pytest.mark.parametrize(
    ("impl", "status", "reason"),
    [
        ("segfaulting", "crashed", "killed by SIGSEGV"),
        ("wrong", "wrong", "above its limit"),
        ("raising", "failed", "illegal access [of memory]"),
        ("hanging", "timeout", "stopped after the time limit of 1"),
    ],
)
def test_what_goes_wrong_on_a_side_ends_the_round(bed, monkeypatch, impl, status, reason):
    (task,) = tasks_of(bed, impl)
    bed.truths(task)
    if impl == "hanging":
        monkeypatch.setattr(bed, "limit_s", 1.0)
    with pytest.raises(RoundError) as caught:
        measure_pair(task, *bed.sides, FAST, random.Random(0))
    assert caught.value.status == status
    assert reason in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_side_that_starts_anew_is_the_same_code(bed, monkeypatch):
    task = tasks_of(bed, "undisturbed")[0]
    base, head = bed.sides
    monkeypatch.setattr(head, "_server", ENDED)
    monkeypatch.setattr(head, "code", "as it was before")
    with pytest.raises(RoundError, match="B: its files changed meanwhile") as caught:
        measure_pair(task, base, head, FAST, random.Random(0))
    assert (caught.value.status, caught.value.at_base) == ("crashed", False)


def test_nor_may_the_code_of_another_repository_change_before_a_new_start(
    bed, tmp_path, monkeypatch
):
    """Its files are younger than the side, which was made when the clock began."""
    with monkeypatch.context() as patch:
        patch.setattr(testbed, "time", types.SimpleNamespace(time=lambda: 0.0))
        side = Side("head", [FAULTS], tmp_path, bed)
    side._server, side._processes, side.code = ENDED, bed.sides[1]._processes, bed.sides[1].code
    task = tasks_of(bed, "undisturbed")[0]
    with pytest.raises(Ended, match=r"faults/\w+\.py changed meanwhile"):
        side.begin(task).open()


@pytest.mark.parametrize("step", ["open", "read 1", "burst 2", "read 2", "finish"])
@pytest.mark.parametrize("number", [0, 1])
def test_whoever_fails_is_blamed(make_task, number, step):
    sides = Scripts(make_task()), Scripts(make_task())
    sides[number].ends = {step: "crashed"}
    with pytest.raises(RoundError, match=f"ended at {step}") as caught:
        measure_pair(sides[0].task, *sides, FAST, random.Random(0))
    assert (caught.value.status, caught.value.at_base) == ("crashed", number == 0)
    assert "kill" in {name for name, _ in sides[1 - number].events} or step == "finish"


def compared(sides, tasks, rule=FAST):
    draw = random.Random(0)

    def measure(task):
        return measure_pair(task, *sides, rule, draw)

    items = Comparison(tasks, measure, DEFAULT_TOLERANCE, draw).carry_out()
    outcome = compare.ComparisonOutcome("A/A", items, DEFAULT_TOLERANCE, [], [])
    return items, exit_code(compare.report_of(outcome).findings)


def test_no_change_eight_times(bed, monkeypatch):
    monkeypatch.setattr(comparison, "STAGES", (3,))
    items, code = compared(bed.sides, tasks_of(bed, "undisturbed"))
    assert len(items) == 8
    assert [item.failed for item in items] == [None] * 8
    assert not {"SLOW", "FAST"} & {item.verdict.word for item in items}
    assert code in (0, 4)
    assert statistics.median(item.verdict.ratio for item in items) == pytest.approx(1, abs=0.1)


@dataclasses.dataclass(eq=False)
class Slower:
    """A side whose block spins for 5 % of its forward pass, which is its whole step here."""

    side: Side
    name: str = "B"

    def begin(self, task):
        return self.side.begin(replace(task, cell=replace(task.cell, impl="undisturbed_slower")))


def test_five_per_cent_more_never_pass(bed, monkeypatch):
    """Really spun in. A loaded machine may leave it open; what it must not do is pass."""
    monkeypatch.setattr(comparison, "STAGES", (5,))
    base, head = bed.sides
    task = tasks_of(bed, "undisturbed")[0]
    cell = replace(task.cell, mode="inference", channels=64, out_channels=64, batch=2)
    rule = RoundRule(bursts=30, seconds=0.2)
    items, code = compared([base, Slower(head)], [replace(task, cell=cell)], rule)
    assert [item.failed for item in items] == [None]
    assert items[0].verdict.word in ("SLOW", "AMBIGUOUS")
    assert code in (1, 4)


def test_a_throttled_machine_allows_no_verdict(bed, monkeypatch):
    monkeypatch.setattr(comparison, "STAGES", (2,))
    (item,), code = compared(bed.sides, tasks_of(bed, "overheated"))
    assert (item.verdict.word, len(item.disturbed)) == ("AMBIGUOUS", 4)
    assert "thermal slowdown held the clocks back" in item.verdict.reasons[0]
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


# The gate, and calibrations


@pytest.fixture
def stage(bed, tmp_path, monkeypatch):
    """A request for two cells, measured on the sides that are there."""
    tasks = tasks_of(bed, "undisturbed")[:2]
    both = dataclasses.replace(bed, tasks=tasks)
    for module in (calibrate, compare):
        monkeypatch.setattr(module, "opened", lambda *a, **k: contextlib.nullcontext(both))
    # Of two revisions of this checkout there are sides already.
    monkeypatch.setattr(
        check_timing,
        "against_base",
        lambda request, console: compare.in_lockstep(request, {}, console),
    )
    monkeypatch.setattr(comparison, "STAGES", (5,))
    plan = plan_of({"impl": "fused", "batch": 1}, {"impl": "fused", "batch": 2})
    return compare.BaseRequest(base="A", plan=plan, start=tmp_path, timeout_s=8.0, rule=FAST)


def quiet_console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def steady(monkeypatch):
    """Rounds of 10 ms that differ by a thousandth, whatever the machine does meanwhile."""
    count = itertools.count()

    def measure(*arguments):
        return a_round(log_ratio=0.001 * (next(count) % 3))

    for module in (calibrate, compare):
        monkeypatch.setattr(module, "measure_pair", measure)


def test_timing_without_calibration_is_no_pass(stage, steady):
    """The cells are the same, but by a tolerance that nobody measured here."""
    found = checked(stage)
    assert [item.verdict.word for item in found.cells] == ["SAME", "SAME"]
    assert [finding.level for finding in found.findings] == ["inconclusive"]
    assert "was never calibrated" in found.findings[0].text
    assert exit_code(found.findings) == 4


def test_timing_with_a_stale_calibration_is_no_pass(stage, bed, steady, tmp_path):
    request = calibrate.CalibrationRequest(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
    calibrate.carry_out(request, quiet_console())
    assert exit_code(checked(stage).findings) == 0
    path = calibration_file(bed.environment, "cpu", tmp_path)
    old = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**old, "saved_at": "2020-01-01T00:00:00Z"}))
    found = checked(stage)
    assert "is stale (it is" in found.findings[0].text
    assert exit_code(found.findings) == 4


def test_a_full_disk_leaves_what_was_measured(stage, steady, monkeypatch):
    measure, count = compare.measure_pair, itertools.count()

    def full(*arguments):
        if next(count) == 10:
            raise OSError(28, "No space left on device")
        return measure(*arguments)

    monkeypatch.setattr(compare, "measure_pair", full)
    monkeypatch.setattr(comparison, "STAGES", (5, 9))
    monkeypatch.setattr(comparison, "judge", lambda es, t: [AMBIGUOUS for _ in es])
    found = checked(stage)
    assert [len(item.rounds) for item in found.cells] == [5, 5]
    text = "No space left on device: this is what the rounds taken so far say"
    assert any(text in finding.text for finding in found.findings)
    assert exit_code(found.findings) == 3


def test_what_could_not_be_stored_is_not_measured(stage, tmp_path, monkeypatch):
    (tmp_path / "results").write_text("a file")
    monkeypatch.setattr(calibrate, "fill", lambda *arguments: pytest.fail("it was measured"))
    request = calibrate.CalibrationRequest(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
    with pytest.raises(UsageError, match="cannot be written"):
        calibrate.carry_out(request, quiet_console())


def test_a_calibration_is_stored_and_used(stage, bed, tmp_path, monkeypatch):
    """Of rounds that were really taken; the noise of so few samples is not that of a machine."""
    taken = []

    def measure(*arguments):
        taken.append(measure_pair(*arguments))
        return msgspec.structs.replace(taken[-1], log_ratio=0.004)

    monkeypatch.setattr(calibrate, "measure_pair", measure)
    for module in (calibrate, calibration):
        monkeypatch.setattr(module, "STAGES", (2,))
    request = calibrate.CalibrationRequest(plan=stage.plan, start=tmp_path, rounds=3, rule=FAST)
    console = quiet_console()
    assert calibrate.carry_out(request, console) == 0
    assert "stored in" in console.file.getvalue()
    assert len(taken) == 6
    found, note = calibration.usable(bed.environment, "cpu", FAST, tmp_path)
    assert note is None
    assert [noise.rounds for noise in found.cells] == [3, 3]
    assert found.tolerance.relative == 0.01
    other = tasks_of(bed, "undisturbed")[2]
    assert "1 of 1 cells were not calibrated" in calibration.of_others(found, [other])[0]
    assert calibration.of_others(found, bed.tasks[:0]) == []
    _, note = calibration.usable(bed.environment, "cpu", RoundRule(), tmp_path)
    assert "is stale (its rounds were taken in another way)" in note
    _, note = calibration.usable(bed.environment, "cuda", FAST, tmp_path)
    assert "was never calibrated" in note


def test_a_throttled_machine_is_not_calibrated(stage, bed, tmp_path, monkeypatch):
    throttled = dataclasses.replace(bed, tasks=tasks_of(bed, "overheated"))
    monkeypatch.setattr(calibrate, "opened", lambda *a, **k: contextlib.nullcontext(throttled))
    request = calibrate.CalibrationRequest(plan=stage.plan, start=tmp_path, rounds=2, rule=FAST)
    with pytest.raises(InvalidError, match=r"cannot be calibrated: 4 of 4 rounds were disturbed"):
        calibrate.carry_out(request, quiet_console())
    assert not list(tmp_path.rglob("*.json"))


def test_a_cell_that_breaks_is_not_calibrated(stage, bed, tmp_path, monkeypatch):
    broken = dataclasses.replace(bed, tasks=tasks_of(bed, "raising"))
    monkeypatch.setattr(calibrate, "opened", lambda *a, **k: contextlib.nullcontext(broken))
    request = calibrate.CalibrationRequest(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
    with pytest.raises(InvalidError, match=r"cannot be calibrated: .*illegal access"):
        calibrate.carry_out(request, quiet_console())
    assert not list(tmp_path.rglob("*.json"))


class Scripts:
    """A side whose parties are made up."""

    def __init__(self, task, samples=lambda number: [10.0], **ends):
        self.name, self.task, self.samples, self.ends = "side", task, samples, ends
        self.events, self.begins = [], None

    def begin(self, task):
        if self.begins is not None:
            raise Ended(row_of(task, self.begins, "no truth"))
        return Scripted(task, self.samples, self.ends, self.events)


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_head_is_told_even_where_the_base_is_wrong(make_task, seed):
    sides = [Scripts(make_task(), open="wrong") for _ in range(2)]
    sides[0].name, sides[1].name = "base", "head"
    with pytest.raises(RoundError, match="head: ended at open") as error:
        measure_pair(sides[0].task, *sides, FAST, random.Random(seed))
    assert not error.value.at_base
    assert [name for name, _ in sides[0].events] == ["open"], "it is not waited for"


def test_without_a_truth_there_is_no_round(make_task):
    sides = [Scripts(make_task()) for _ in range(2)]
    for side in sides:
        side.begins = "oom"
    with pytest.raises(RoundError, match="no truth") as error:
        measure_pair(sides[0].task, *sides, FAST, random.Random(0))
    assert error.value.status == "oom"


def test_a_slower_side_is_not_slower_still_for_its_fewer_samples(make_task):
    base, head = [1.2, 1.0, 1.0, 1.0], [1.05 * ms for ms in (1.2, 1.0)]
    sides = [Scripts(make_task(), lambda number, ms=ms: ms) for ms in (base, head)]
    found = measure_pair(sides[0].task, *sides, FAST, random.Random(0))
    assert found.log_ratio == pytest.approx(math.log(1.05))
    assert (found.base_samples, found.head_samples) == (12, 6)
