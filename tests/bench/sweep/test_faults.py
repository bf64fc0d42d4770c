"""What goes wrong in a sweep: the row, the exit code, and that nothing measured is lost."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.sweeps import (
    QUICK,
    TINY,
    children_of,
    many,
    meanwhile,
    rows_of,
    started,
    wait_for_death,
    wait_for_hanging,
    wait_for_rows,
)

from resblock_bench.bench.cli import main as cli
from resblock_bench.bench.compare import calibrate
from resblock_bench.bench.records import Environment, Row
from resblock_bench.bench.runs.folder import read_run
from resblock_bench.bench.sweep import engines
from resblock_bench.bench.sweep.sweep import exit_code

pytestmark = pytest.mark.slow


IN_CHECK = {
    "raising": ("failed", "RuntimeError: illegal access [of memory] (line", 3),
    "segfaulting": ("crashed", "killed by SIGSEGV, in its phase 'check'", 3),
    "killed": ("crashed", "killed by SIGKILL, in its phase 'check'", 3),
    "exiting": ("crashed", "its process ended with code 7, in its phase 'check': leaving", 3),
    "hanging": ("timeout", "time limit of 4.0s, in its phase 'check'", 3),
    "wrong": ("wrong", "above its limit", 5),
    "unimportable": ("skipped", "its package cannot be used", 0),
    "mistyped": ("skipped", "its package cannot be used", 0),
}
LATER = {
    "late_crash": ("crashed", "killed by SIGSEGV, in its phase 'timing'", 3),
    "late_raise": ("failed", "RuntimeError: illegal access [of memory] (line", 3),
    "late_oom": ("oom", "MemoryError: no more", 0),
    "late_hang": ("timeout", "time limit of 4.0s, in its phase 'timing'", 3),
    "cached": ("wrong", "with other inputs than at first, out: relative error", 5),
    "slow_clock": ("impossible", "its own is not to be trusted", 3),
}
LOST = {**IN_CHECK, **LATER}
"""The status of a variant, a part of its reason, and the exit code that it means alone."""


class Measured(NamedTuple):
    rows: dict[str, Row]
    out: str
    err: str


@pytest.fixture(scope="module")
def block(
    tmp_path_factory: pytest.TempPathFactory, one_survey: Callable[..., Environment]
) -> Measured:
    """One block, most of whose variants are lost on the way."""
    folder = tmp_path_factory.mktemp("block") / "run"
    impls = ",".join(["reference", *LOST, "printing", "fused"])
    arguments = ["run", *TINY, *QUICK, "-a", f"impl={impls}", "--timeout", "4s"]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ending,
    ):
        patch.setattr(engines, "survey", one_survey)
        cli.main([*arguments, "--output", str(folder)])
    assert ending.value.code == 5
    return Measured(rows_of(folder), " ".join(out.getvalue().split()), err.getvalue())


@pytest.mark.parametrize("impl", LOST)
def test_a_variant_that_is_lost_says_why(block: Measured, impl: str) -> None:
    status, reason, code = LOST[impl]
    row = block.rows[impl]
    assert row.status == status, row.reason
    assert reason in (row.reason or "")
    assert (row.ratio, row.ratio_to_none) == (None, None)
    if impl in IN_CHECK:
        assert row.samples_ms is None
    assert reason in block.out
    others = [block.rows[name] for name in ("reference", "fused")]
    assert exit_code([*others, row], 3, None) == code


def test_what_a_cell_prints_is_not_shown_but_where_it_crashed_the_end_is_kept(
    block: Measured,
) -> None:
    assert block.rows["printing"].status == "ok"
    assert "spam" not in block.out + block.err
    trace = block.rows["segfaulting"].output or ""
    assert "Fatal Python error: Segmentation fault" in trace


def test_the_others_of_its_block_stand_with_their_ratios(block: Measured) -> None:
    reference, fused = block.rows["reference"], block.rows["fused"]
    assert (reference.status, fused.status) == ("ok", "ok")
    assert reference.block == fused.block is not None
    for row in (reference, fused):
        assert row.rounds == [1] * 6
        assert row.ratio is not None
        assert row.ratio == row.ratio_to_none
        assert row.ratio.low is not None
        assert row.ratio.high is not None
        assert row.ratio.low <= row.ratio.value <= row.ratio.high
    assert reference.ratio is not None
    assert (reference.ratio.value, reference.ratio.low, reference.ratio.high) == (1.0, 1.0, 1.0)
    assert reference.conditions == fused.conditions


def test_larger_cells_than_one_that_ran_out_of_memory_are_skipped(
    run_cli: Callable, tmp_path: Path
) -> None:
    selection = ("run", "-a", "channels=32", "-a", "resolution=4", "-a", "mode=inference", *QUICK)
    selection += ("-a", "impl=reference,greedy", "--memory-limit", "1GiB")
    done = run_cli(*selection, "-a", "batch=1,2", "--output", tmp_path / "run")
    assert done.code == 0
    found = {(row.axes.impl, row.axes.batch): row for row in read_run(tmp_path / "run").rows}
    assert found["greedy", 1].status == "oom"
    assert {row.memory_limit_bytes for row in found.values()} == {2**30}
    assert found["greedy", 2].status == "skipped"
    assert "b1" in (found["greedy", 2].reason or "")
    assert found["reference", 2].status == "ok"
    again = ("--resume", "--output", tmp_path / "run")
    assert "0 cells on" in run_cli(*selection, "-a", "batch=1,2", *again).out
    run_cli(*selection, "-a", "batch=1,2", *again, "--ignore-oom-record")
    found = {(row.axes.impl, row.axes.batch): row for row in read_run(tmp_path / "run").rows}
    assert (found["greedy", 2].status, found["greedy", 2].attempt) == ("oom", 2)
    assert found["reference", 2].attempt == 2, "its block was measured whole"
    assert found["greedy", 1].attempt == 2


def test_an_interrupt_in_a_block_keeps_those_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, impl="reference,fused")
    try:
        wait_for_rows(folder, 2, process)
        family = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert_keeps_those_before(folder, out)
    wait_for_death(family)


def test_sigterm_in_a_block_keeps_those_before(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_cli("run", *TINY, *QUICK, "-a", "impl=reference", "--output", tmp_path / "warm")
    before, family = children_of(os.getpid()), set()

    def terminate() -> None:
        wait_for_rows(folder, 2)
        family.update(children_of(os.getpid()) - before)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(terminate):
        done = run_cli(*many("reference,fused"), "--output", folder)
    assert done.code == 3
    assert "Traceback" not in done.err
    assert_keeps_those_before(folder, done.out)
    wait_for_death(family)


def assert_keeps_those_before(folder: Path, out: str) -> None:
    rows = read_run(folder).rows
    assert f"interrupted: {len(rows)} rows are in {folder}, {600 - len(rows)} cells" in out
    assert "--resume" in out
    # Of the block that was under way there is nothing.
    assert len({row.block for row in rows}) == len(rows) / 2


def test_an_interrupted_calibration_says_so_and_stores_nothing(
    run_cli: Callable, found: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bed = types.SimpleNamespace(environment=found, notes=[], tasks=[])
    monkeypatch.setattr(calibrate, "opened", lambda *a, **k: contextlib.nullcontext(bed))
    monkeypatch.setattr(calibrate, "fill", lambda *a: signal.raise_signal(signal.SIGTERM))
    done = run_cli("calibrate", *TINY, "-a", "impl=reference")
    assert done.code == 3
    assert done.err == "resblock-bench: interrupted: nothing is stored but what is said above\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_kill_9_of_a_cell_from_outside_is_a_crash_of_that_cell(
    run_cli: Callable, tmp_path: Path
) -> None:
    arguments = ("run", *TINY, *QUICK, "-a", "impl=hanging", "--timeout", "600s")
    with meanwhile(lambda: os.kill(wait_for_hanging(os.getpid()), signal.SIGKILL)):
        run_cli(*arguments, "--output", tmp_path / "run")
    (row,) = read_run(tmp_path / "run").rows
    assert row.status == "crashed"
    assert "killed by SIGKILL" in (row.reason or "")


def test_foreign_load_while_a_cell_is_timed_is_told(run_cli: Callable, tmp_path: Path) -> None:
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        done = run_cli(
            "run", *TINY, "--threads", 1, "--no-plots", "-a", "impl=slow", "--max-time", "1s",
            "--output", tmp_path / "run",
        )  # fmt: skip
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert done.code == 0
    (row,) = read_run(tmp_path / "run").rows
    assert row.conditions is not None
    assert any("CPUs" in sentence for sentence in row.conditions.disturbances)
    assert "!" in done.out


def test_hundreds_of_skipped_cells_need_no_process(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli(
        "run", "-a", "channels=32", "-a", "resolution=4", "-a", "batch=[1:300:+1]", "-a", "dims=1",
        "-a", "layout=nhwc", "-a", "mode=inference", "-a", "impl=reference", *QUICK,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 3
    rows = read_run(tmp_path / "run").rows
    assert [row.status for row in rows] == ["skipped"] * 300
    assert {row.wall_s for row in rows} == {None}


def test_a_reader_that_leaves_ends_nothing(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        done = run_cli("run", *TINY, *QUICK, "--output", tmp_path / "run")
        stdout.write("nobody hears this, and nobody complains")
    assert (done.code, done.err) == (0, "")
    assert len(read_run(tmp_path / "run").rows) == 2


def test_a_fault_of_the_suite_is_not_taken_for_a_regression(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("resblock_bench.bench.sweep.sweep.carry_out", fail)
    done = run_cli("run", *TINY, "--output", tmp_path / "run")
    assert done.code == 3
    assert "ZeroDivisionError" in done.err
