"""What goes wrong in a sweep: the row, the exit code, and that nothing measured is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.records import Row, cell_id
from resblock_bench.bench.storage import RunWriter, read_rows, read_run

TINY = ("-a", "channels=32", "-a", "resolution=4", "-a", "batch=1", "-a", "mode=inference")
QUICK = ("--samples", "6", "--threads", "1", "--no-plots")
RunCli = Callable[..., "object"]


def rows_of(folder: Path) -> dict[str, Row]:
    return {row.axes.impl: row for row in read_run(folder).rows}


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
    assert found["reference", 2].attempt == 1


@pytest.mark.parametrize("impl", ["unimportable", "mistyped"])
def test_an_implementation_that_cannot_be_used_is_skipped(sweep: Callable, impl: str) -> None:
    done, rows = sweep(impl)
    assert done.code == 0
    assert rows[impl].status == "skipped"
    assert "its package cannot be used" in (rows[impl].reason or "")


def test_what_failed_is_tried_again_on_request_only(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    selection = ("run", *TINY, *QUICK, "-a", "impl=reference,raising", "--output", folder)
    assert run_cli(*selection).code == 3
    before = (folder / "cells.jsonl").read_bytes()
    assert run_cli("run", "--no-plots", "--output", folder, "--resume").code == 3
    assert (folder / "cells.jsonl").read_bytes() == before
    done = run_cli("run", "--no-plots", "--output", folder, "--resume", "--retry-failed")
    assert done.code == 3
    assert "1 cells on" in done.out
    after = (folder / "cells.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1
    assert (rows_of(folder)["raising"].attempt, len(read_run(folder).rows)) == (2, 2)


def started(
    folder: Path, *more: str, impl: str = "reference", cells: int = 300, **options: object
) -> "subprocess.Popen[str]":
    """A sweep of some hundred cells in a process of its own."""
    command = [sys.executable, "-m", "resblock_bench.bench", "run", *QUICK]
    command += ["-a", "channels=32", "-a", "resolution=4", "-a", f"batch=[1:{cells}:+1]"]
    command += ["-a", "mode=inference", "-a", f"impl={impl}", "--output", str(folder), *more]
    # A shell's background jobs ignore Ctrl-C, and so would this process.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload, no-any-return]


def wait_for_rows(process: "subprocess.Popen[str]", folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    cells = folder / "cells.jsonl"
    while not cells.exists() or cells.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> set[int]:
    """All processes under one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_kill_9_at_a_random_cell_then_resume(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder)
    try:
        wait_for_rows(process, folder, 1 + time.time_ns() % 5)
        family = children_of(process.pid)
        process.kill()
        process.communicate(timeout=60)
    finally:
        process.kill()
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in family):
        assert time.monotonic() < deadline, "a cell outlived the suite"
        time.sleep(0.05)
    before = (folder / "cells.jsonl").read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    done = run_cli(
        "run", "--no-plots", "--resume", "--output", folder, "--time-budget", "3s"
    )  # fmt: skip
    assert done.code == 3, done.err
    rows = read_run(folder).rows
    assert (folder / "cells.jsonl").read_bytes().startswith(kept)
    batches = [row.axes.batch for row in rows]
    # With a time budget the heaviest of what is missing comes first.
    first = kept.count(b"\n")
    assert batches[:first] == list(range(1, first + 1))
    assert batches[first:] == list(range(300, 300 - len(batches[first:]), -1))
    assert {row.attempt for row in rows} == {1}
    assert len(rows) > kept.count(b"\n")


def test_a_killed_suite_leaves_no_cell_that_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path / "run", "--timeout", "300s", impl="hanging")
    try:
        deadline = time.monotonic() + 60
        family: set[int] = set()
        # The truth's process leads a group as well, but is over soon.
        while not any(leads(pid) and age_s(pid) > 2 for pid in family):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            family = children_of(process.pid)
        process.kill()
        process.communicate(timeout=60)
    finally:
        process.kill()
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in family):
        assert time.monotonic() < deadline, "a cell outlived the suite"
        time.sleep(0.05)


def leads(pid: int) -> bool:
    """Whether a process leads a group, as that of a cell does."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def age_s(pid: int) -> float:
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return 0.0
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - int(start) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = started(folder)
    try:
        wait_for_rows(process, folder, 2)
        family = children_of(process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, err
    assert "Traceback" not in err
    rows = read_run(folder).rows
    assert f"interrupted: {len(rows)} rows are in {folder}, {300 - len(rows)} cells" in out
    assert "--resume" in out
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in family):
        assert time.monotonic() < deadline, "a cell outlived the suite"
        time.sleep(0.05)


def test_kill_9_of_a_cell_from_outside_is_a_crash_of_that_cell(
    run_cli: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = started(folder, "--timeout", "60s", impl="hanging")
    try:
        deadline = time.monotonic() + 60
        victim = 0
        while not victim:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            # A cell leads a process group of its own.
            leaders = [pid for pid in children_of(process.pid) if os.getpgid(pid) == pid]
            cells = [pid for pid in leaders if (folder / "cells.jsonl").exists()]
            victim = cells[0] if cells else 0
            time.sleep(0.02)
        time.sleep(2)  # into its check
        (victim,) = [p for p in children_of(process.pid) if os.getpgid(p) == p]
        os.kill(victim, signal.SIGKILL)
        wait_for_rows(process, folder, 1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    row = read_run(folder).rows[0]
    assert row.status == "crashed"
    assert "killed by SIGKILL" in (row.reason or "")


def test_a_full_disk_keeps_what_fitted_and_can_be_resumed(
    run_cli: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    limit = 40_000  # about ten rows, and the plan

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = started(folder, cells=40, preexec_fn=fill)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, (out, err)
    assert "Traceback" not in err
    rows = read_run(folder).rows
    assert rows
    assert f"cannot be written (File too large): {len(rows)} rows are in" in out, out
    done = run_cli("run", "--no-plots", "--resume", "--output", folder, "--time-budget", "1ms")
    assert "which has" in done.out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(run_cli: Callable, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    done = run_cli("run", *TINY, *QUICK, "--output", tmp_path / "run")
    tmp_path.chmod(0o755)
    assert done.code == 2
    assert "Permission denied" in done.err


def test_a_read_only_file_system_is_refused(run_cli: Callable) -> None:
    """/proc takes no folders, whoever asks."""
    done = run_cli("run", *TINY, *QUICK, "--output", "/proc/run")
    assert done.code == 2
    assert "cannot write to /proc/run" in done.err
    assert done.err.count("\n") == 1


@pytest.fixture
def finished(run_cli: Callable, tmp_path: Path) -> Path:
    """A run of two cells."""
    folder = tmp_path / "run"
    assert run_cli("run", *TINY, *QUICK, "--output", folder).code == 0
    return folder


def test_a_truncated_last_line_is_reported_and_repaired(run_cli: Callable, finished: Path) -> None:
    cells = finished / "cells.jsonl"
    content = cells.read_bytes()
    cells.write_bytes(content[:-100])
    shown = run_cli("plot", finished)
    assert shown.code == 0
    assert "half-written" in shown.err + shown.out
    assert cells.read_bytes() == content[:-100]
    done = run_cli("run", "--no-plots", "--resume", "--output", finished)
    assert done.code == 0
    assert "the half-written last line" in done.out
    assert "1 cells on" in done.out
    assert cells.read_bytes().startswith(content.splitlines(keepends=True)[0])
    assert len(read_run(finished).rows) == 2


def test_a_last_line_that_lacks_only_its_end_is_kept(run_cli: Callable, finished: Path) -> None:
    cells = finished / "cells.jsonl"
    content = cells.read_bytes()
    cells.write_bytes(content[:-1])
    assert len(read_run(finished).rows) == 2
    assert "0 cells on" in run_cli("run", "--no-plots", "--resume", "--output", finished).out
    assert cells.read_bytes() == content


@pytest.mark.parametrize("verb", [("run", "--resume", "--output"), ("plot",)], ids=["run", "plot"])
def test_garbage_in_the_middle_is_named_and_left_alone(
    run_cli: Callable, finished: Path, verb: tuple[str, ...]
) -> None:
    cells = finished / "cells.jsonl"
    first, second = cells.read_bytes().splitlines(keepends=True)
    cells.write_bytes(first + b"garbage \xff\n" + second)
    before = cells.read_bytes()
    done = run_cli(*verb, finished)
    assert done.code == 2
    assert f"{cells}, line 2 is damaged" in done.err
    assert cells.read_bytes() == before


def test_a_row_of_a_newer_schema_is_named(run_cli: Callable, finished: Path) -> None:
    cells = finished / "cells.jsonl"
    first, second = cells.read_text().splitlines()
    newer = {**json.loads(second), "schema_version": 99, "brand_new": 1}
    cells.write_text(f"{first}\n{json.dumps(newer)}\n")
    done = run_cli("run", "--resume", "--output", finished)
    assert done.code == 2
    assert "line 2 has schema version 99" in done.err


@pytest.mark.parametrize(
    ("field", "value"),
    [("machine", "elsewhere"), ("cpu", "another CPU"), ("threads", 64), ("gpu", "a GPU")],
)
def test_a_folder_of_another_machine_is_not_resumed(
    run_cli: Callable, finished: Path, field: str, value: object
) -> None:
    path = finished / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    before = (finished / "cells.jsonl").read_bytes()
    done = run_cli("run", "--resume", "--output", finished)
    assert done.code == 2
    assert "another machine" in done.err
    assert f"{field} was {value}" in done.err
    assert (finished / "cells.jsonl").read_bytes() == before
    assert json.loads(path.read_text())[field] == value


def test_other_software_is_not_mixed_in(run_cli: Callable, finished: Path) -> None:
    path = finished / "environment.json"
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "2.0.0"
    path.write_text(json.dumps(content))
    done = run_cli("run", "--resume", "--output", finished)
    assert done.code == 2
    assert "torch was 2.0.0 and is" in done.err


def test_resuming_with_other_options_is_refused(run_cli: Callable, finished: Path) -> None:
    done = run_cli("run", *TINY, *QUICK, "--seed", 7, "--resume", "--output", finished)
    assert done.code == 2
    assert "begun with seed 0, and 7 was asked for" in done.err


def test_the_same_command_with_resume_adds_cells(run_cli: Callable, finished: Path) -> None:
    more = ("run", *TINY[:-2], "-a", "mode=inference,forward", *QUICK)
    done = run_cli(*more, "--resume", "--output", finished)
    assert done.code == 0
    assert "2 cells on" in done.out
    assert [row.axes.mode for row in read_run(finished).rows] == ["inference"] * 2 + ["forward"] * 2
    assert "0 cells on" in run_cli("run", "--resume", "--no-plots", "--output", finished).out


def of_other_code(folder: Path) -> str:
    """The rows of a folder as other code would have written them."""
    lines = []
    for row in read_rows(folder):
        other = msgspec.structs.replace(
            row, code="other", id=cell_id(row.axes, row.contract, "other")
        )
        lines.append(msgspec.json.encode(other).decode())
    return "\n".join(lines) + "\n"


def test_rows_of_other_code_do_not_count(run_cli: Callable, finished: Path) -> None:
    cells = finished / "cells.jsonl"
    cells.write_text(of_other_code(finished))
    resume = ("run", "--resume", "--no-plots", "--output", finished)
    done = run_cli(*resume)
    assert done.code == 0
    assert "2 rows there were measured by other code" in done.out
    assert "2 cells on" in done.out
    assert [row.code for row in read_rows(finished)].count("other") == 2
    assert [row.code for row in read_run(finished).rows].count("other") == 0
    assert "0 cells on" in run_cli(*resume).out


def test_going_back_to_earlier_code_finds_its_rows(run_cli: Callable, finished: Path) -> None:
    with (finished / "cells.jsonl").open("a") as file:
        file.write(of_other_code(finished))
    assert "0 cells on" in run_cli("run", "--resume", "--no-plots", "--output", finished).out


def test_two_runs_into_one_folder_are_refused(run_cli: Callable, finished: Path) -> None:
    with RunWriter(finished, resume=True):
        done = run_cli("run", "--resume", "--output", finished)
        assert done.code == 2
        assert "another run is writing to" in done.err
        with pytest.raises(UsageError, match="already holds a run"):
            RunWriter(finished)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "name it with --output"),
        (["--resume", "--output", "absent"], "absent holds no run to resume"),
        (["--retry-failed", "--output", "run"], "goes with --resume"),
        (["--memory-limit", "4"], "'4' is not a size"),
        (["--timeout", "soon"], "'soon' is not a duration"),
        (
            ["--resume", "--seed", "7", "--output", "run"],
            "--seed is set by the run that is",
        ),
        (["--resume", "--dry-run", "--output", "run"], "plan.json cannot be read"),
        (["--device", "cpu", "--devices", "0"], "--devices names GPUs"),
        (["--device", "cpu", "--accelerator", "H100"], "--accelerator goes with --engine ray"),
        (["--engine", "rye"], "did you mean 'ray'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_are_one_sentence(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = run_cli("run", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_plan_is_damaged_is_named(run_cli: Callable, finished: Path) -> None:
    (finished / "plan.json").write_text('{"cells": 3')
    done = run_cli("run", "--resume", "--output", finished)
    assert done.code == 2
    assert "plan.json is damaged" in done.err


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


def test_two_thousand_skipped_cells_need_no_process(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli(
        "run", "-a", "channels=32", "-a", "resolution=4", "-a", "batch=[1:2000:+1]", "-a", "dims=1",
        "-a", "layout=nhwc", "-a", "mode=inference", "-a", "impl=reference", *QUICK,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 3
    rows = read_run(tmp_path / "run").rows
    assert [row.status for row in rows] == ["skipped"] * 2000
    assert {row.wall_s for row in rows} == {None}


def test_a_run_ended_before_it_had_a_plan_can_be_begun_again(
    run_cli: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cells.jsonl").touch()
    assert run_cli("run", *TINY, *QUICK, "--output", tmp_path / "run").code == 0


def test_a_refused_folder_is_not_even_repaired(run_cli: Callable, finished: Path) -> None:
    cells = finished / "cells.jsonl"
    cells.write_bytes(cells.read_bytes()[:-100])
    path = finished / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "another"}))
    before = cells.read_bytes()
    assert run_cli("run", "--resume", "--output", finished).code == 2
    assert cells.read_bytes() == before


def test_a_dry_run_of_a_resumption_shows_the_cells_of_the_run(
    run_cli: Callable, finished: Path
) -> None:
    assert "2 cell(s)" in run_cli("run", "--resume", "--dry-run", "--output", finished).out


def test_a_table_that_cannot_be_written_is_no_loss(run_cli: Callable, finished: Path) -> None:
    (finished / "cells.csv").mkdir()
    done = run_cli("run", "--resume", "--format", "csv", "--no-plots", "--output", finished)
    assert done.code == 0
    assert "no more tables or figures" in done.out


def test_a_reader_that_leaves_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, cells=3)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    process.stderr.close()
    assert len(read_run(folder).rows) == 3


def test_a_fault_of_the_suite_is_not_taken_for_a_regression(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("resblock_bench.bench.sweep.carry_out", fail)
    done = run_cli("run", *TINY, "--output", tmp_path / "run")
    assert done.code == 3
    assert "ZeroDivisionError" in done.err
