"""Rounds on real processes, and a revision of a repository against its working tree."""

import random
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from cells import TINY
from rich.console import Console

from resblock_bench.bench import compare, comparison
from resblock_bench.bench.comparison import Comparison
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings import exit_code
from resblock_bench.bench.grid import PlannedCell
from resblock_bench.bench.plan import Plan
from resblock_bench.bench.rounds import RoundError, RoundRule, measure_pair, take_bursts
from resblock_bench.bench.source_tree import checked_out, python_paths, repository_around, resolve
from resblock_bench.bench.testbed import opened
from resblock_bench.bench.timing import Rule
from resblock_bench.bench.verdict import DEFAULT_TOLERANCE

ROOT = Path(__file__).parents[2]
FAST = RoundRule(burst_s=0.0, bursts=2, samples=3)
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
    assert min(taken.base_samples, taken.head_samples) >= FAST.samples
    assert taken.base_ms > 0 < taken.head_ms
    assert taken.disturbances == []
    (alone,), _ = take_bursts(task, bed.truth(task), [head], FAST, random.Random(0))
    assert len(alone) >= FAST.bursts
    assert sum(map(len, alone)) >= FAST.samples


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


def test_another_repository_names_its_sources(project, tmp_path):
    assert python_paths(project, [Path("kernels")], tmp_path) == [project / "kernels"]
