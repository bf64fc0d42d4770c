"""What goes wrong in a sweep: the row, the exit code, and that nothing measured is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sweeps import (
    QUICK,
    TINY,
    children_of,
    rows_of,
    spawned,
    started,
    wait_for_death,
    wait_for_hanging,
    wait_for_rows,
)

from resblock_bench.bench.cli import main as cli
from resblock_bench.bench.records import Row
from resblock_bench.bench.runs.folder import read_run

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(run_cli: Callable, tmp_path: Path) -> Callable:
    """Run faulty implementations between two good ones; the rows by implementation."""

    def run(impl: str, *more: object) -> tuple[object, dict[str, Row]]:
        done = run_cli(
            "run", *TINY, *QUICK, "-a", f"impl=reference,{impl},fused", *more,
            "--output", tmp_path / "run",
        )  # fmt: skip
        rows = rows_of(tmp_path / "run")
        assert (rows["reference"].status, rows["fused"].status) == ("ok", "ok")
        return done, rows

    return run


@pytest.mark.parametrize(
    ("impl", "status", "reason"),
    [
        ("raising", "failed", "RuntimeError: illegal access [of memory] (line"),
        ("segfaulting", "crashed", "killed by SIGSEGV, in its phase 'check'"),
        ("killed", "crashed", "killed by SIGKILL, in its phase 'check'"),
        ("exiting", "crashed", "its process ended with code 7, in its phase 'check': leaving"),
    ],
)
def test_a_cell_that_breaks_is_a_row_and_ends_nothing_else(
    sweep: Callable, impl: str, status: str, reason: str
) -> None:
    done, rows = sweep(impl)
    assert done.code == 3
    assert rows[impl].status == status
    assert reason in (rows[impl].reason or "")
    assert rows[impl].samples_ms is None
    assert reason in done.out.replace("\n", " ")


LOST = {
    "late_crash": ("crashed", "killed by SIGSEGV, in its phase 'timing'"),
    "late_raise": ("failed", "RuntimeError: illegal access [of memory] (line"),
    "late_oom": ("oom", "MemoryError: no more"),
    "late_hang": ("timeout", "time limit of 8.0s, in its phase 'timing'"),
    "cached": ("wrong", "with other inputs than at first, out: relative error"),
    "slow_clock": ("impossible", "its own is not to be trusted"),
    "segfaulting": ("crashed", "killed by SIGSEGV, in its phase 'check'"),
    "wrong": ("wrong", "above its limit"),
}


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The rows of one block, most of whose variants are lost on the way."""
    folder = tmp_path_factory.mktemp("block") / "run"
    impls = ",".join(["reference", *LOST, "fused"])
    arguments = ["run", *TINY, *QUICK, "-a", f"impl={impls}", "--timeout", "8s"]
    with pytest.raises(SystemExit) as ending:
        cli.main([*arguments, "--output", str(folder)])
    assert ending.value.code == 5
    return rows_of(folder)


@pytest.mark.parametrize("impl", LOST)
def test_a_variant_that_is_lost_says_why(block: dict[str, Row], impl: str) -> None:
    status, reason = LOST[impl]
    row = block[impl]
    assert row.status == status, row.reason
    assert reason in (row.reason or "")
    assert (row.ratio, row.ratio_to_none) == (None, None)


def test_the_others_of_its_block_stand_with_their_ratios(block: dict[str, Row]) -> None:
    reference, fused = block["reference"], block["fused"]
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


def test_a_cell_that_hangs_is_ended(sweep: Callable) -> None:
    done, rows = sweep("hanging", "--timeout", "8s")
    assert done.code == 3
    assert rows["hanging"].status == "timeout"
    assert "time limit of 8.0s, in its phase 'check'" in (rows["hanging"].reason or "")


def test_a_cell_that_prints_a_megabyte_is_measured_in_silence(sweep: Callable) -> None:
    done, rows = sweep("printing")
    assert done.code == 0
    assert rows["printing"].status == "ok"
    assert "spam" not in done.out + done.err


def test_the_end_of_what_a_crashed_cell_printed_is_kept(sweep: Callable) -> None:
    _, rows = sweep("segfaulting")
    assert "Fatal Python error: Segmentation fault" in (rows["segfaulting"].output or "")


def test_memory_that_is_not_there_is_a_result(sweep: Callable) -> None:
    done, rows = sweep("greedy", "--memory-limit", "1GiB")
    assert done.code == 0
    assert rows["greedy"].status == "oom"
    assert rows["greedy"].memory_limit_bytes == 2**30
    assert rows["reference"].memory_limit_bytes == 2**30


def test_larger_cells_than_one_that_ran_out_of_memory_are_skipped(
    run_cli: Callable, tmp_path: Path
) -> None:
    selection = ("run", "-a", "channels=32", "-a", "resolution=4", "-a", "mode=inference", *QUICK)
    selection += ("-a", "impl=greedy,reference", "--memory-limit", "1GiB")
    done = run_cli(*selection, "-a", "batch=1,2", "--output", tmp_path / "run")
    assert done.code == 0
    found = {(row.axes.impl, row.axes.batch): row for row in read_run(tmp_path / "run").rows}
    assert found["greedy", 1].status == "oom"
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


@pytest.mark.parametrize("impl", ["unimportable", "mistyped"])
def test_an_implementation_that_cannot_be_used_is_skipped(sweep: Callable, impl: str) -> None:
    done, rows = sweep(impl)
    assert done.code == 0
    assert rows[impl].status == "skipped"
    assert "its package cannot be used" in (rows[impl].reason or "")


def test_a_killed_suite_leaves_no_cell_that_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path / "run", "--timeout", "600s", impl="hanging")
    try:
        wait_for_hanging(process)
        family = children_of(process.pid)
        process.kill()
        process.communicate(timeout=300)
    finally:
        process.kill()
    wait_for_death(family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = started(folder)
    try:
        wait_for_rows(process, folder, 2)
        family = children_of(process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 3, err
    assert "Traceback" not in err
    rows = read_run(folder).rows
    assert f"interrupted: {len(rows)} rows are in {folder}, {300 - len(rows)} cells" in out
    assert "--resume" in out
    wait_for_death(family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_calibration_says_so_and_stores_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = spawned("calibrate", *TINY, "-a", "impl=reference", cwd=tmp_path)
    try:
        assert process.stdout is not None
        assert "calibrating" in process.stdout.readline()
        family = children_of(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 3
    assert err == "resblock-bench: interrupted: nothing is stored but what is said above\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    wait_for_death(family)


def test_kill_9_of_a_cell_from_outside_is_a_crash_of_that_cell(
    run_cli: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = started(folder, "--timeout", "600s", impl="hanging")
    try:
        os.kill(wait_for_hanging(process), signal.SIGKILL)
        wait_for_rows(process, folder, 1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    finally:
        process.kill()
    row = read_run(folder).rows[0]
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


def test_a_reader_that_leaves_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, cells=3)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    process.stderr.close()
    assert len(read_run(folder).rows) == 3


def test_a_fault_of_the_suite_is_not_taken_for_a_regression(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("resblock_bench.bench.sweep.sweep.carry_out", fail)
    done = run_cli("run", *TINY, "--output", tmp_path / "run")
    assert done.code == 3
    assert "ZeroDivisionError" in done.err
