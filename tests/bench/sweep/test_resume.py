"""Folders of runs: what a resumption keeps, adds, mends and refuses."""

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from faulty_blocks import HANGING_BATCH
from support.sweeps import (
    QUICK,
    TINY,
    children_of,
    many,
    rows_of,
    started,
    wait_for_death,
    wait_for_hanging,
)

from resblock_bench.bench.cli import main as cli
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.records import Environment, cell_id
from resblock_bench.bench.runs.folder import create_run, read_run, resume_run
from resblock_bench.bench.sweep import engines

pytestmark = pytest.mark.slow


def test_what_failed_is_tried_again_on_request_only(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    selection = ("run", *TINY, *QUICK, "-a", "impl=reference,raising", "--output", folder)
    assert run_cli(*selection).code == 3
    before = (folder / "cells.jsonl").read_bytes()
    assert run_cli("run", "--no-plots", "--output", folder, "--resume").code == 3
    assert (folder / "cells.jsonl").read_bytes() == before
    done = run_cli("run", "--no-plots", "--output", folder, "--resume", "--retry-failed")
    assert done.code == 3
    assert "2 cells on" in done.out, "with its reference, whose rounds it has to share"
    after = (folder / "cells.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 2
    rows = rows_of(folder)
    assert {name: row.attempt for name, row in rows.items()} == {"reference": 2, "raising": 2}


def test_kill_9_at_a_random_cell_leaves_no_process_and_can_be_resumed(
    run_cli: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = 1 + time.time_ns() % 5
    variables = {**os.environ, HANGING_BATCH: str(first + 1)}
    process = started(folder, "--timeout", "600s", impl="hanging_once", env=variables)
    try:
        wait_for_hanging(process.pid, process)
        family = children_of(process.pid)
        process.kill()
        process.communicate(timeout=300)
    finally:
        process.kill()
    wait_for_death(family)
    before = (folder / "cells.jsonl").read_bytes()
    assert before.count(b"\n") == first
    done = run_cli("run", "--no-plots", "--resume", "--output", folder, "--time-budget", "1s")
    assert done.code == 3, done.err
    assert (folder / "cells.jsonl").read_bytes().startswith(before)
    rows = read_run(folder).rows
    batches = [row.axes.batch for row in rows]
    # With a time budget the heaviest of what is missing comes first.
    assert batches[:first] == list(range(1, first + 1))
    assert batches[first:] == list(range(300, 300 - len(batches[first:]), -1))
    assert {row.attempt for row in rows} == {1}
    assert len(rows) > first


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """This process writes no larger ones."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_fitted_and_can_be_resumed(
    run_cli: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # What cells are forked from starts before.
    run_cli("run", *TINY, *QUICK, "-a", "impl=reference", "--output", tmp_path / "warm")
    with largest_file(10_000):  # two rows and a half, and the plan
        done = run_cli(*many("reference", 9), "--output", folder)
    assert done.code == 3, (done.out, done.err)
    assert "Traceback" not in done.err
    rows = read_run(folder).rows
    assert rows
    assert f"cannot be written (File too large): {len(rows)} rows are in" in done.out, done.out
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
    assert "/proc/run cannot be written" in done.err
    assert done.err.count("\n") == 1


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory, one_survey: Callable[..., Environment]
) -> Path:
    """A run of two cells."""
    folder = tmp_path_factory.mktemp("original") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ending:
        patch.setattr(engines, "survey", one_survey)
        cli.main(["run", *TINY, *QUICK, "--output", str(folder)])
    assert not ending.value.code
    return folder


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "run"))


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
    assert "2 cells on" in done.out, "what is left of a block says nothing of a new row"
    assert cells.read_bytes().startswith(content.splitlines(keepends=True)[0])
    rows = read_run(finished).rows
    assert sorted(row.attempt for row in rows) == [1, 2]
    assert len({row.block for row in rows}) == 1


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
    assert done.code == 3
    assert f"{cells}, line 2 is damaged" in done.err
    assert cells.read_bytes() == before


def test_a_row_of_a_newer_schema_is_named(run_cli: Callable, finished: Path) -> None:
    cells = finished / "cells.jsonl"
    first, second = cells.read_text().splitlines()
    newer = {**json.loads(second), "schema_version": 99, "brand_new": 1}
    cells.write_text(f"{first}\n{json.dumps(newer)}\n")
    done = run_cli("run", "--resume", "--output", finished)
    assert done.code == 3
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
    done = run_cli("run", *TINY, *QUICK, "--max-time", "2s", "--resume", "--output", finished)
    assert done.code == 2
    assert "begun with max_time_s 3.5, and 2.0 was asked for" in done.err


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
    for row in read_run(folder).attempts:
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
    assert [row.code for row in read_run(finished).attempts].count("other") == 2
    assert [row.code for row in read_run(finished).rows].count("other") == 0
    assert "0 cells on" in run_cli(*resume).out


def test_going_back_to_earlier_code_finds_its_rows(run_cli: Callable, finished: Path) -> None:
    with (finished / "cells.jsonl").open("a") as file:
        file.write(of_other_code(finished))
    assert "0 cells on" in run_cli("run", "--resume", "--no-plots", "--output", finished).out


def test_two_runs_into_one_folder_are_refused(run_cli: Callable, finished: Path) -> None:
    with resume_run(finished) as run:
        done = run_cli("run", "--resume", "--output", finished)
        assert done.code == 2
        assert "another run is writing to" in done.err
        refusal = pytest.raises(UsageError, match="another run is writing to")
        with refusal, create_run(finished, run.plan, run.environment):
            pass


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
    assert done.code == 3
    assert "plan.json is damaged" in done.err


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
    assert "2 cells;" in run_cli("run", "--resume", "--dry-run", "--output", finished).out


def test_a_table_that_cannot_be_written_is_no_loss(run_cli: Callable, finished: Path) -> None:
    (finished / "cells.csv").mkdir()
    done = run_cli("run", "--resume", "--format", "csv", "--no-plots", "--output", finished)
    assert done.code == 0
    assert "no more tables, figures or page" in done.out
