"""Rounds on real processes, and a revision of a repository against its working tree."""

import contextlib
import dataclasses
import io
import itertools
import random
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from cells import TINY
from rich.console import Console

from resblock_bench.bench import (
    baseline_timing,
    calibrate,
    check,
    check_timing,
    compare,
    comparison,
)
from resblock_bench.bench.comparison import Comparison
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings import exit_code
from resblock_bench.bench.grid import PlannedCell
from resblock_bench.bench.machine_store import history, machine_folder, write
from resblock_bench.bench.plan import Plan
from resblock_bench.bench.rounds import RoundError, RoundRule, Taken, measure_pair, take_bursts
from resblock_bench.bench.source_tree import checked_out, python_paths, repository_around, resolve
from resblock_bench.bench.stored import read_baseline
from resblock_bench.bench.testbed import opened
from resblock_bench.bench.timing import Rule
from resblock_bench.bench.verdict import DEFAULT_TOLERANCE

ROOT = Path(__file__).parents[2]
FAST = RoundRule(burst_s=0.0, bursts=3, seconds=0.0)
COLD = Rule(warmup_s=0.0, warmup_max_s=0.0, warmup_min_steps=1)
THROTTLED = '{"t_s": 0, "throttled_us": {"heat": 0}}\n{"t_s": 1, "throttled_us": {"heat": 500}}\n'

# Appended to the fused block of one side: what it does depends on the batch.
SPOILED = """
import time as _time

_forward = ResBlock.forward


def _spoiled(self, x, emb):
    if len(x) == {slow}:
        _time.sleep(0.02)
    out = _forward(self, x, emb)
    return out * 1.01 if len(x) == {wrong} else out


ResBlock.forward = _spoiled
"""
SAME, HEAD_SLOW, HEAD_WRONG, BASE_SLOW, BASE_WRONG = range(2, 7)


def plan_of(*changes):
    """The plan of some tiny cells on one thread."""
    cells = [PlannedCell(msgspec.structs.replace(TINY, **change), 1) for change in changes]
    return Plan(device="cpu", rule=COLD, seed=0, threads=1, memory_limit_bytes=None, cells=cells)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A trace of an undisturbed machine."""
    path = tmp_path_factory.mktemp("trace") / "quiet.jsonl"
    path.write_text('{"t_s": 0}\n{"t_s": 1}\n')
    return path


# Two sides of the same code


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
    (alone,), _ = take_bursts(task, bed.truth(task), [head], FAST, random.Random(0))
    assert len(alone) == FAST.bursts


@pytest.mark.parametrize(
    ("impl", "status", "reason"),
    [
        ("segfaulting", "crashed", "its process ended with -11"),
        ("wrong", "wrong", "above its limit"),
        ("raising", "failed", "illegal access [of memory]"),
        ("hanging", "timeout", "after the time limit of 8"),
    ],
)
def test_what_goes_wrong_on_a_side_ends_the_round(bed, impl, status, reason):
    (task,) = tasks_of(bed, impl)
    with pytest.raises(RoundError) as caught:
        measure_pair(task, bed.truth(task), *bed.sides, FAST, random.Random(0))
    assert caught.value.status == status
    assert reason in str(caught.value)


def compared(bed, tasks):
    draw = random.Random(0)

    def measure(task):
        return measure_pair(task, bed.truth(task), *bed.sides, FAST, draw)

    items = Comparison(tasks, measure, DEFAULT_TOLERANCE, draw).carry_out()
    outcome = compare.Outcome("A/A", items, DEFAULT_TOLERANCE, [], [])
    return items, exit_code(compare.report_of(outcome).findings)


def test_no_change_twenty_times(bed, monkeypatch):
    monkeypatch.setattr(comparison, "STAGES", (5,))
    items, code = compared(bed, tasks_of(bed, "fused"))
    assert len(items) == 20
    assert [item.failed for item in items] == [None] * 20
    assert not {"SLOW", "FAST"} & {item.verdict.word for item in items}
    assert code in (0, 4)


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
        return Taken([[[10.0 + 0.01 * (next(count) % 3)]]], [])

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

    other = msgspec.structs.replace(whole.environment, cpu="Another CPU")
    write(path, msgspec.structs.replace(whole, environment=other))
    with pytest.raises(InvalidError, match=r"cpu was Another CPU and is .*save a baseline here"):
        baseline_timing.against_baseline(stage, path, quiet_console())

    rule = msgspec.structs.replace(FAST, bursts=7)
    write(path, msgspec.structs.replace(whole, rule=rule))
    with pytest.raises(InvalidError, match=r"rounds' bursts was 7 and is 3"):
        baseline_timing.against_baseline(stage, path, quiet_console())


def test_timing_without_calibration_is_no_pass(stage, steady, monkeypatch, tmp_path):
    """The cells are the same, but by a tolerance that nobody measured here."""
    baseline_timing.save(stage, "here", quiet_console())
    path = next(tmp_path.rglob("timing.json"))
    monkeypatch.setattr(check_timing, "baseline_file", lambda start: path)
    done = check_timing.check(stage, quiet_console())
    assert [finding.level for finding in done.findings] == ["inconclusive"]
    assert "was never calibrated" in done.findings[0].text
    assert exit_code(done.findings) == 4


def test_a_calibration_is_stored_and_used(stage, bed, tmp_path):
    request = calibrate.Request(plan=stage.plan, start=tmp_path, rounds=5, rule=FAST)
    console = quiet_console()
    assert calibrate.carry_out(request, console) == 0
    assert "stored in" in console.file.getvalue()
    found, note = compare.usable_calibration(bed.environment, FAST, tmp_path)
    assert note is None
    assert [noise.rounds for noise in found.cells] == [5, 5]
    assert found.tolerance.relative >= 0.01
    tolerance, notes = compare.tolerance_here(bed.environment, FAST, tmp_path)
    assert (tolerance, notes) == (found.tolerance, [])
    _, note = compare.usable_calibration(bed.environment, RoundRule(), tmp_path)
    assert "is stale (its rounds were taken in another way)" in note


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
        with pytest.raises(InvalidError, match=r"is no baseline: 10 rounds were disturbed"):
            baseline_timing.save(stage, "hot", quiet_console())
    assert not list(tmp_path.rglob("*.json"))


# A revision and the working tree


def git(folder, *arguments):
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository with this project's packages. Its base is slow and wrong for some batches, its
    working tree for others; the branch `broken` cannot be imported."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("reference", "kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    blocks = folder / "kernels" / "blocks.py"
    source = blocks.read_text()
    git(folder, "init", "--quiet", "--initial-branch=broken")
    for branch, text in (
        ("broken", source + "\n)\n"),
        ("base", source + SPOILED.format(slow=BASE_SLOW, wrong=BASE_WRONG)),
    ):
        git(folder, "checkout", "--quiet", "-B", branch)
        blocks.write_text(text)
        git(folder, "add", "-A")
        git(folder, "commit", "--quiet", "-m", branch)
    blocks.write_text(source + SPOILED.format(slow=HEAD_SLOW, wrong=HEAD_WRONG))
    return folder


def against(project, quiet, revision):
    batches = (SAME, HEAD_SLOW, HEAD_WRONG, BASE_SLOW, BASE_WRONG)
    request = compare.BaseRequest(
        base=revision,
        plan=plan_of(*({"impl": "fused", "batch": batch} for batch in batches)),
        start=project / "kernels",
        timeout_s=120.0,
        telemetry=quiet,
        rule=FAST,
    )
    return compare.against_base(request, Console(quiet=True))


@pytest.fixture(scope="module")
def outcome(project, quiet):
    return against(project, quiet, "base")


@pytest.fixture(scope="module")
def items(outcome):
    return {item.cell.batch: item for item in outcome.items}


def level_of(outcome, batch):
    """The finding about a cell and the exit code that it means alone."""
    (item,) = [item for item in outcome.items if item.cell.batch == batch]
    findings = compare.findings([item], "compare")
    return (findings[0].level if findings else None), exit_code(findings), findings


def test_a_slower_working_tree_is_a_regression(outcome, items):
    item = items[HEAD_SLOW]
    assert (item.verdict.word, item.confirmed) == ("SLOW", True)
    assert item.head > item.base
    assert level_of(outcome, HEAD_SLOW)[:2] == ("regression", 1)


def test_what_is_the_same_is_not_called_slow(outcome, items):
    assert items[SAME].verdict.word in ("SAME", "AMBIGUOUS")
    assert level_of(outcome, SAME)[1] in (0, 4)


def test_a_wrong_working_tree_is_wrong(outcome, items):
    assert items[HEAD_WRONG].failed[0] == "wrong"
    assert level_of(outcome, HEAD_WRONG)[:2] == ("wrong", 5)
    assert exit_code(compare.report_of(outcome).findings) == 5


def test_a_wrong_base_leaves_nothing_to_compare(outcome, items):
    assert items[BASE_WRONG].at_base
    assert level_of(outcome, BASE_WRONG)[:2] == ("invalid", 3)


def test_several_times_as_fast_is_to_be_explained(outcome):
    level, code, findings = level_of(outcome, BASE_SLOW)
    assert (level, code) == ("invalid", 3)
    assert "find out what it no longer does" in findings[0].text


def test_the_sides_are_named_and_differ(outcome, project):
    commit = git(project, "rev-parse", "base").strip()
    assert outcome.title == f"the working tree against base ({commit[:9]})"
    assert outcome.notes == []
    assert any("was never calibrated" in note for note in outcome.uncalibrated)


def test_a_base_that_does_not_build(project, quiet):
    with pytest.raises(InvalidError, match=r"broken .* cannot be imported.*SyntaxError"):
        against(project, quiet, "broken")


def test_the_worktree_is_gone_afterwards(project):
    with checked_out(project, resolve(project, "base")) as tree:
        assert (tree / "kernels" / "blocks.py").is_file()
    assert not tree.exists()
    assert len(git(project, "worktree", "list").splitlines()) == 1


def test_revisions_and_folders_that_are_not_there(project, tmp_path):
    with pytest.raises(UsageError, match=r"--base 'nowhere' is no revision of"):
        resolve(project, "nowhere")
    with pytest.raises(UsageError, match=r"is in no git repository"):
        repository_around(tmp_path)
    with pytest.raises(UsageError, match=r"--source src is no folder of"):
        python_paths(project, [Path("src")], tmp_path)
    with pytest.raises(UsageError, match=r"is not a checkout of resblock-bench.*--source src"):
        python_paths(tmp_path, [], tmp_path)


def test_a_revision_that_is_not_there_is_found_before_anything_is_measured(
    run_cli, project, monkeypatch
):
    monkeypatch.chdir(project)
    monkeypatch.setattr(check, "check", lambda *arguments: pytest.fail("it was measured"))
    done = run_cli("check", "--base", "nowhere")
    assert done.code == 2
    assert "--base 'nowhere' is no revision of" in done.err


def test_another_repository_names_its_sources(project, tmp_path):
    assert python_paths(project, [Path("kernels")], tmp_path) == [project / "kernels"]
