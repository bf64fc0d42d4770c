"""A whole run, on a bench that answers from a script or the interpreter."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.tuning import SMALL, Interpreted, Scripted, choices, shaped

from resblock_bench.bench.checkout import source_state
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.runs.table import WIDTH
from resblock_bench.bench.tune import bucket as tune_measure
from resblock_bench.bench.tune import cases as tune_cases
from resblock_bench.bench.tune import choices as tune_choices
from resblock_bench.bench.tune import tune
from resblock_bench.bench.tune.cases import Case
from resblock_bench.bench.tune.gpu import DeviceLost
from resblock_bench.bench.tune.tune import TuneRequest
from resblock_bench.kernels import dispatch, tuned
from resblock_bench.kernels.tiers import Direction, Launch
from resblock_bench.kernels.tuned import Bucket

Tune = Callable[..., SimpleNamespace]


TINY = ["channels=64", "resolution=4", "batch=1", "dtype=fp32"]


@pytest.fixture
def run_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tune:
    """Tune a tiny selection with a bench into a table in tmp_path: code, output, path, entries."""

    def run(bench: Scripted, *arguments: str, clock: Any = None, **fields: Any) -> SimpleNamespace:
        path = fields.pop("output", tmp_path / "table.json")
        request = TuneRequest(tune_choices.select(list(arguments or TINY)), output=path, **fields)
        options = {} if clock is None else {"clock": clock}
        code = tune.tune(request, Console(width=WIDTH), bench, **options)
        out = capsys.readouterr().out
        entries = tuned.read(path).entries if path is not None and path.exists() else None
        return SimpleNamespace(code=code, out=out, path=path, entries=entries)

    return run


def halved(how: Launch) -> float:
    """Every launch of four warps takes half as long."""
    return 5.0 if how.num_warps == 4 else 10.0


@pytest.mark.slow
def test_a_run_from_end_to_end_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line's arguments to the launch that a call takes."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(dispatch, "_machine", lambda device: (SMALL, "sm_00"))
    tuned.forget()
    x = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    assert dispatch.launch_for("forward", x, 32).num_warps == 1
    monkeypatch.setattr(tune_measure, "REPEATS", 1)
    bench = Interpreted(halved)
    arguments = ["channels=64", "resolution=8", "batch=1", "dtype=fp32", "layout=nhwc"]
    request = TuneRequest(tune_choices.select(arguments), budget_s=180.0)
    assert tune.tune(request, Console(width=WIDTH), bench) == 0
    path = tmp_path / "tables" / "sm_00.json"
    table = tuned.read(path)
    assert table.arch == "sm_00" and table.machine["gpu"] == "a scripted GPU"
    assert set(table.machine) == {"gpu", "driver", "torch", "triton", "cuda"}
    commit, _ = source_state(Path(tune.__file__).parent)
    assert table.commit.removesuffix("-dirty") == (commit or "unknown")
    assert table.measured_at.endswith("+00:00")
    assert [entry.bucket for entry in table.entries] == [
        Bucket(direction, "nhwc", 4, 2, 64, 32) for direction in ("backward", "forward")
    ]
    # The table is in force at once.
    taken = dispatch.launch_for("forward", x, 32)
    assert taken.reason.startswith("measured on sm_00") and taken.num_warps == 4
    out = capsys.readouterr().out
    assert f"2 buckets of calls on a scripted GPU (sm_00) into {path}" in out
    assert "[2/2] forward nhwc 32-bit 2×64 ×32: A w4, 5.0 µs; the rules' takes 10.0 µs" in out
    assert {how.tier for _, how in bench.ran} == {"A", "C"} and "refused:" not in out
    assert "2 of 2 buckets: the rules are as good in 0 and beaten in 2, by 50% to 50%." in out
    tuned.forget()


def test_a_table_has_a_line_for_each_bucket(run_tune: Tune) -> None:
    done = run_tune(Scripted(halved), *TINY, "layout=nchw,nhwc")
    assert done.code == 0
    lines = done.path.read_text().splitlines()
    assert sum('"bucket"' in line for line in lines) == len(done.entries) == 4
    assert json.loads(done.path.read_text())["arch"] == "sm_00"
    assert done.path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in done.path.parent.iterdir()] == ["table.json"]


def test_a_wrong_rule_ends_with_5_and_writes_nothing_for_its_bucket(run_tune: Tune) -> None:
    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        return out if case.saved is None else out | {"dx": out["dx"] * 1.01}

    done = run_tune(Scripted(around=around))
    assert done.code == 5
    assert [entry.bucket.direction for entry in done.entries] == ["forward"]
    assert "WRONG: backward nchw 32-bit 2×16 ×32: A w1 (the rules'): dx has a relative" in done.out
    assert "the rules' is WRONG" in done.out


def test_another_wrong_launch_is_said_and_ends_with_0(run_tune: Tune) -> None:
    arguments = ["channels=64", "resolution=16", "batch=1", "layout=nhwc", "mode=forward"]

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        return out | {"y": out["y"] * (1.05 if how.tier == "A" else 1)}

    done = run_tune(Scripted(around=around), *arguments)
    assert done.code == 0 and len(done.entries) == 1
    wrong = [line for line in done.out.splitlines() if line.startswith("WRONG: forward nhwc")]
    assert [line.split(": ")[2] for line in wrong] == ["A w16", "A w8", "A w4"]
    assert all(line.split(": ")[3].startswith("y has a relative error") for line in wrong)


def test_a_rule_that_does_not_launch_ends_with_3(run_tune: Tune) -> None:
    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        if case.saved is None:
            raise RuntimeError("[out of resources]")
        return out

    done = run_tune(Scripted(around=around))
    assert done.code == 3
    assert [entry.bucket.direction for entry in done.entries] == ["backward"]
    reason = "the rules' own launch was refused: RuntimeError: [out of resources]"
    assert f"not measured: forward nchw 32-bit 2×16 ×32: {reason}" in done.out
    assert "refused: 1 launch: RuntimeError: [out of resources]" in done.out


def test_what_memory_does_not_hold_is_a_result(
    run_tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_case = tune_cases.draw_case

    def draw(direction: Direction, *rest: Any) -> Case:
        if direction == "backward" or everything:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_case(direction, *rest)

    monkeypatch.setattr(tune_measure, "draw_case", draw)
    everything = False
    done = run_tune(Scripted())
    assert done.code == 0 and len(done.entries) == 1
    assert "not measured: backward" in done.out and "memory does not hold it" in done.out
    everything = True
    assert run_tune(Scripted()).code == 3


def ticking(bench: Scripted) -> Callable[[], float]:
    """A clock on which every measured time costs a second."""
    return lambda: float(len(bench.timed))


THREE = ["channels=64", "resolution=4,8,16", "batch=1", "dtype=fp32", "mode=forward", "layout=nhwc"]


def test_a_spent_budget_ends_between_two_buckets(run_tune: Tune) -> None:
    first, second, _ = tune_choices.buckets(tune_choices.select(THREE))
    bench = Scripted()
    cost = len(choices(problem=first.problem))
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=cost)
    assert done.code == 3 and len(bench.timed) == cost
    assert [entry.bucket for entry in done.entries] == [first.bucket]
    line = f"stopped, since the time budget is spent: {done.path} has what was measured"
    assert f"{line}, 2 buckets are left" in done.out
    assert "1 of 3 buckets: the rules are as good in 1." in done.out

    bench = Scripted()
    cost += len(choices(problem=second.problem))
    os.remove(done.path)
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=cost)
    assert [entry.bucket for entry in done.entries] == sorted([first.bucket, second.bucket])


@pytest.mark.parametrize("better", [True, False])
def test_a_bucket_cut_short_keeps_what_is_better_and_leaves_the_rest(
    run_tune: Tune, better: bool
) -> None:
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    second = choices(problem=first.problem)[1]
    fast = shaped(second, problem=first.problem)
    bench = Scripted(lambda how: 5.0 if better and how == fast else 10.0)
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=2)
    assert done.code == 3 and "3 buckets are left" in done.out
    if better:
        assert [entry.choice for entry in done.entries] == [second]
    else:
        assert done.entries is None and "out of time; 2 of" in done.out


def test_a_whole_run_within_its_budget_ends_with_0(run_tune: Tune) -> None:
    bench = Scripted()
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=1000)
    assert done.code == 0 and len(done.entries) == 3
    assert "left" not in done.out.splitlines()[-1]


def test_runs_add_up(run_tune: Tune) -> None:
    """Buckets without an entry come first, and those that are not measured again stay."""
    works = tune_choices.buckets(tune_choices.select(THREE))
    seen = []
    for work_ in [*works, works[0]]:
        bench = Scripted()
        budget_s = len(choices(problem=work_.problem))
        done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=budget_s)
        calls = [dispatch.problem_of(case.inputs.x, 32) for case, _ in bench.ran]
        assert set(calls) == {work_.problem}
        seen.append(len(done.entries))
    assert seen == [1, 2, 3, 3]


def test_an_entry_is_replaced_once_it_is_measured_again(run_tune: Tune) -> None:
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    best = choices(problem=first.problem)[1]
    fast = shaped(best, problem=first.problem)
    done = run_tune(Scripted(lambda how: 5.0 if how == fast else 10.0), *THREE)
    assert {e.bucket: e.choice for e in done.entries}[first.bucket] == best
    one = [*THREE[:1], "resolution=16", *THREE[2:]]
    done = run_tune(Scripted(), *one)
    assert len(done.entries) == 3
    assert {e.bucket: e.choice for e in done.entries}[first.bucket] != best


def test_an_entry_that_is_refused_goes(run_tune: Tune) -> None:
    """Here the rules fail too, so that nothing replaces it."""
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    run_tune(Scripted(), *THREE)  # the rules', by choice

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        raise RuntimeError("the driver is another one")

    done = run_tune(Scripted(around=around), *THREE[:1], "resolution=16", *THREE[2:])
    assert done.code == 3
    assert first.bucket not in {entry.bucket for entry in done.entries}
    assert len(done.entries) == 2


def test_an_interrupt_keeps_what_was_measured(run_tune: Tune) -> None:
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    count = len(choices(problem=first.problem))

    def time_us(how: Launch) -> float:
        if len(bench.timed) == count + 1:
            raise KeyboardInterrupt
        return 10.0

    bench = Scripted(time_us)
    done = run_tune(bench, *THREE)
    assert done.code == 3
    assert [entry.bucket for entry in done.entries] == [first.bucket]
    assert f"interrupted: {done.path} has what was measured, 2 buckets are left" in done.out


def test_a_hanging_launch_ends_a_run_and_keeps_what_was_measured(run_tune: Tune) -> None:
    first, second, _ = tune_choices.buckets(tune_choices.select(THREE))

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        if case.inputs.x[0, 0].numel() == second.problem.HW:
            raise DeviceLost("did not end within 20s")
        return out

    bench = Scripted(around=around)
    done = run_tune(bench, *THREE)
    assert done.code == 3 and bench.gave_up
    assert [entry.bucket for entry in done.entries] == [first.bucket]
    rules = tune_choices.choice_name(choices(problem=second.problem)[0])
    launch = f"{tune_choices.bucket_name(second.bucket)}: {rules}"
    assert f"stopped: {launch} did not end within 20s, and the GPU runs nothing more" in done.out
    assert "Please report this launch. To measure the rest, select blocks (-a)" in done.out


def test_a_disk_that_fills_up_leaves_the_table_as_it_was(
    run_tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_tune(Scripted(), *TINY).path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    done = run_tune(Scripted(), *TINY)
    assert done.code == 3
    assert "stopped, since" in done.out and "(No space left on device)" in done.out
    assert done.path.read_bytes() == before
    assert [p.name for p in done.path.parent.iterdir()] == ["table.json"]


def test_tables_that_cannot_be_kept_are_usage_errors(run_tune: Tune, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for text, problem in [
        ("{", "is not a table of launches .*remove it"),
        ('{"arch": "sm_00"}', "is not a table of launches"),
        (
            '{"arch":"sm_99","machine":{},"commit":"","measured_at":"","entries":[]}',
            "was measured on sm_99, and this GPU is sm_00: give another --output",
        ),
    ]:
        path.write_text(text)
        bench = Scripted()
        with pytest.raises(UsageError, match=problem):
            run_tune(bench)
        assert path.read_text() == text and bench.ran == []


def test_an_output_that_cannot_be_written_is_a_usage_error(run_tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\(Is a directory\): give an --output"):
        run_tune(Scripted(), output=tmp_path)
    (tmp_path / "file").touch()
    bench = Scripted()
    with pytest.raises(UsageError, match=r"cannot be written .*give an --output that is writable"):
        run_tune(bench, output=tmp_path / "file" / "table.json")
    assert bench.ran == []


def test_a_selection_without_a_norm_is_a_usage_error(run_tune: Tune) -> None:
    with pytest.raises(UsageError, match="has 4 positions: give a larger resolution"):
        run_tune(Scripted(), "channels=64", "resolution=1")


def test_without_a_gpu_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = TuneRequest(tune_choices.select(TINY), output=tmp_path / "sub" / "table.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="tune measures on a GPU, and PyTorch sees none"):
        tune.tune(request, Console())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with pytest.raises(UsageError, match="Triton is not installed"):
        tune.tune(request, Console())
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    with pytest.raises(UsageError, match="TRITON_INTERPRET=1 is set"):
        tune.tune(request, Console())
