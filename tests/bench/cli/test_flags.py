"""Options are looked at before work begins, whatever the command is to do with them."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resblock_bench.bench.cli import app, listing
from resblock_bench.bench.cli.app import default_threads
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.machine import proc
from resblock_bench.bench.sweep import sweep

TINY = ("-a", "channels=32", "-a", "resolution=4", "-a", "batch=2", "-a", "mode=inference")


@pytest.fixture(params=["--dry-run", "--no-plots"])
def run(
    request: pytest.FixtureRequest, run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable:
    """`run` as a dry run and as a real one, neither of which may begin."""
    stop = pytest.fail
    monkeypatch.setattr(sweep, "carry_out", lambda *_: stop("began to measure"))
    monkeypatch.setattr(listing, "planned_cells", lambda *_: stop("began to predict"))
    return lambda *more: run_cli("run", *TINY, request.param, *more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "xyz"], "unknown format 'xyz'"),
        (["--format", ""], "unknown format ''"),
        (["--timeout", "abc"], "'abc' is not a duration"),
        (["--time-budget", "1e9h"], "is not a duration"),
        (["--max-time", "0s"], "is not a duration"),
        (["--memory-limit", "9999999999GiB"], "is not a size"),
        (["--engine", "slurm"], "unknown engine 'slurm'"),
        (["--devices", "0"], "--devices names GPUs, and this run measures on the CPU"),
        (["--devices", ""], "--devices names GPUs, and this run measures on the CPU"),
        (["--accelerator", "H100"], "--accelerator goes with --engine ray"),
        (["--engine", "ray", "--devices", "0", "--device", "cuda"], "finds its own"),
        (["--device", "cuda", "--memory-limit", "1GiB"], "--memory-limit is for cells on a CPU"),
        (["--device", "cuda", "--devices", "99"], "GPU"),
        (["--threads", "1000"], "--threads 1000 is more than the"),
        (["--threads", "9999"], "less than or equal to 1024"),
        (["--samples", "9" * 23], "less than or equal to"),
        (["--seed", "9" * 23], "less than or equal to"),
        (["--output", ""], "an empty path"),
        (["--output", "x" * 5000], "no file can have this path"),
        (["--config", ""], "an empty path"),
        (["--output", "x\udcff"], "it is not UTF-8"),
        (["--retry-failed"], "--retry-failed goes with --resume"),
        (["--resume"], "--resume needs the folder of the run"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_a_run_cannot_do_is_refused_also_where_nothing_runs(
    run: Callable, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if options == ["--resume"]:
        monkeypatch.undo()
    done = run("--device", "cpu", *options) if "--device" not in options else run(*options)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize("arguments", [["check", "--pins"], ["cost", "--json"], ["plot"]])
def test_no_verb_takes_an_empty_path(run_cli: Callable, arguments: list[str]) -> None:
    done = run_cli(*arguments, "")
    assert done.code == 2
    assert "an empty path names no file and no folder" in done.err


@pytest.mark.parametrize(
    ("value", "threads"),
    [("1", 1), ("3,2", 3), ("64", 4), ("", None), ("0", None), ("-2", None), ("many", None)],
)
def test_threads_are_by_default_those_of_every_program_with_openmp(
    monkeypatch: pytest.MonkeyPatch, value: str, threads: int | None
) -> None:
    monkeypatch.setattr(proc, "usable_cpus", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == threads
    assert app.checked_threads(None) == threads
    assert app.checked_threads(2) == 2


def test_more_threads_than_cpus_are_for_a_cluster_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "usable_cpus", lambda: 4)
    assert app.checked_threads(64, "ray") == 64
    with pytest.raises(UsageError, match="more than the 4 CPUs"):
        app.checked_threads(5)


def test_a_run_and_the_gate_compute_with_as_many_threads(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise what `calibrate` has measured is of no use to what `run` measures."""
    from resblock_bench.bench.compare import calibrate

    seen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "carry_out", lambda request, _: seen.append(request.plan) or 0)
    monkeypatch.setattr(calibrate, "carry_out", lambda request, _: seen.append(request.plan) or 0)
    run_cli("run", *TINY, "--device", "cpu")
    run_cli("calibrate", *TINY, "--device", "cpu")
    assert [plan.threads for plan in seen] == [None, None]


def test_an_interrupt_shows_the_cells_predicted_so_far(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = listing._predicted, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(listing, "_predicted", interrupted)
    done = run_cli("run", "-a", "channels=64", "-a", "batch=1,2,3", "--dry-run")
    assert done.code == 3
    assert "interrupted after 2 of 6 cells; the largest is predicted to need" in done.out
    assert "64 32² b1 fp32 nchw train fused/none" in " ".join(done.out.split())


def test_many_cells_are_predicted_with_progress(run_cli: Callable) -> None:
    done = run_cli("list", "-a", "channels=64", "-a", "batch=[2:60:+1]", "-a", "mode=inference")
    assert done.code == 0
    assert "118 cells; the largest" in done.out
    assert "predicting memory: 118 tasks" in done.err and "[118/118]" in done.err


def test_a_cell_that_the_block_refuses_is_not_predicted_fine(run_cli: Callable) -> None:
    selection = ("-a", "channels=32", "-a", "resolution=1", "-a", "impl=reference")
    done = run_cli("list", *selection, "-a", "batch=1,2")
    text = " ".join(done.out.split())
    assert "no prediction for reference (1 cell): PyTorch refuses a norm over a single" in text
    assert "2 cells; the largest" in text
    assert "predicted to need" not in run_cli("list", *selection, "-a", "batch=1").out


@pytest.mark.parametrize("width", [20, 40, 60])
def test_cells_have_names_on_a_narrow_terminal(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run_cli("list", *TINY)
    assert "32 4² b2 fp32" in done.out


def test_the_largest_plan_is_written_in_one_breath() -> None:
    assert len(plan([parse_arguments(["batch=[1:50000:+1]", "channels=32"])])) == 100_000


@pytest.mark.slow
def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-c", "from resblock_bench.bench.__main__ import main; main()", "list"],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(filter(None, sys.path))}"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 3
    assert done.stderr == "resblock-bench: interrupted: nothing was begun\n"
