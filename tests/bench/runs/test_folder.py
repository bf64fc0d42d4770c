import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pandas
import pytest

from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.records import Ceilings, Environment, Row
from resblock_bench.bench.runs.folder import create_run, default_output, read_run, resume_run

Measure = Callable[..., Row]


@pytest.fixture
def rows(some_row: Callable[[str], Row], measure: Measure) -> list[Row]:
    ok = some_row("inference")
    skipped = measure(dims=1, layout="nhwc")
    return [ok, msgspec.structs.replace(skipped, wall_s=0.5)]


@pytest.fixture
def folder(tmp_path: Path, rows: list[Row], plan: Plan, found: Environment) -> Path:
    with create_run(tmp_path / "run", plan, found) as run:
        for row in rows:
            run.append(row)
    return tmp_path / "run"


def test_what_is_written_is_read_back(
    folder: Path, rows: list[Row], plan: Plan, found: Environment
) -> None:
    run = read_run(folder)
    assert run.rows == rows
    assert (run.plan, run.environment) == (plan, found)


def test_pandas_reads_the_rows(folder: Path, rows: list[Row]) -> None:
    frame = pandas.read_json(folder / "cells.jsonl", lines=True)
    assert list(frame["status"]) == ["ok", "skipped"]
    assert frame["samples_ms"][0] == pytest.approx(rows[0].samples_ms, rel=1e-14)
    assert frame["axes"][0]["channels"] == 32
    assert frame["median_ms"][0] == pytest.approx(rows[0].median_ms, rel=1e-14)


def test_a_row_is_on_disk_before_append_returns(
    tmp_path: Path, rows: list[Row], plan: Plan, found: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tmp_path / "run" / "cells.jsonl"
    synced: list[int] = []
    with create_run(tmp_path / "run", plan, found) as run:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(len(cells.read_bytes())))
        for row in rows:
            run.append(row)
            assert synced[-1] == len(cells.read_bytes()) > 0
    assert len(synced) == 2


def test_a_row_for_which_nothing_ran_is_written_and_not_waited_for(
    tmp_path: Path, rows: list[Row], plan: Plan, found: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with create_run(tmp_path / "run", plan, found) as run:
        monkeypatch.setattr(os, "fsync", synced.append)
        run.append(msgspec.structs.replace(rows[1], wall_s=None))
        assert (tmp_path / "run" / "cells.jsonl").read_bytes().count(b"\n") == 1
    assert synced == []


def test_a_full_disk_leaves_whole_rows(
    tmp_path: Path, rows: list[Row], plan: Plan, found: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: len(data) - 50])

    with create_run(tmp_path / "run", plan, found) as run:
        run.append(rows[0])
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left"):
            run.append(rows[1])
        assert run.attempts == rows[:1]
    run = read_run(tmp_path / "run")
    assert (run.rows, run.notes) == (rows[:1], ())


@pytest.mark.parametrize(
    ("where", "kept"), [("write", 1), ("fsync", 2)], ids=["before the row", "after the row"]
)
def test_an_interrupt_leaves_whole_rows(
    tmp_path: Path,
    rows: list[Row],
    plan: Plan,
    found: Environment,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    kept: int,
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with create_run(tmp_path / "run", plan, found) as run:
        run.append(rows[0])
        monkeypatch.setattr(os, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.append(rows[1])
        assert run.attempts == rows[:kept]
    assert read_run(tmp_path / "run").rows == rows[:kept]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    folder: Path, plan: Plan, found: Environment
) -> None:
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    refusal = pytest.raises(UsageError, match="already holds a run: continue it with --resume")
    with refusal, create_run(folder, plan, msgspec.structs.replace(found, cpu="another")):
        pass
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_a_run_that_goes_on_keeps_the_ceilings_it_began_with(
    folder: Path, plan: Plan, found: Environment
) -> None:
    faster = Ceilings(copy_bytes_per_s=2.0, peak_bytes_per_s=3.0, matrix_flops_per_s={})
    with resume_run(folder) as run:
        assert run.go_on(plan, msgspec.structs.replace(found, ceilings=faster)) is None
        assert run.environment.ceilings == found.ceilings
    assert read_run(folder).environment == found


def test_an_unwritable_folder_is_refused(tmp_path: Path, plan: Plan, found: Environment) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="give an"), create_run(place, plan, found):
            pass


def damaged(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Rewrite the second line."""
    cells = folder / "cells.jsonl"
    first, second = cells.read_text().splitlines()
    changed = change(json.loads(second))
    second = changed if isinstance(changed, str) else json.dumps(changed)
    cells.write_text(f"{first}\n{second}\n")


def before_lockstep(row: dict[str, object]) -> dict[str, object]:
    """As it was written when cells were timed one after the other."""
    later = {"block", "rounds", "ratio", "ratio_to_none"}
    contract = {k: v for k, v in row["contract"].items() if k != "turns"}  # type: ignore[attr-defined]
    old = {k: v for k, v in row.items() if k not in later}
    return {**old, "contract": contract, "schema_version": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: json.dumps(row)[:-20], "line 2 is damaged"),
        (lambda row: "", "line 2 is damaged"),
        (lambda row: "[1, 2]", "line 2 is damaged"),
        (lambda row: {**row, "colour": "red"}, "line 2 is damaged.*colour"),
        (lambda row: {k: v for k, v in row.items() if k != "status"}, "line 2 is damaged.*status"),
        (lambda row: {**row, "status": "great"}, "line 2 is damaged.*great"),
        (lambda row: {**row, "multiplicity": "1"}, "line 2 is damaged.*multiplicity"),
        (lambda row: {**row, "median_ms": -1.0}, "line 2 is damaged.*median_ms"),
        (lambda row: {**row, "median_ms": 0}, "line 2 is damaged.*median_ms"),
        (lambda row: {**row, "ci_low_ms": float("nan")}, "line 2 is damaged"),
        (lambda row: {**row, "ci_high_ms": float("inf")}, "line 2 is damaged"),
        (lambda row: {**row, "median_ms": 5e-324}, "line 2 is damaged.*median_ms"),
        (lambda row: {**row, "graph_median_ms": 1e308}, "line 2 is damaged.*graph_median_ms"),
        (lambda row: {**row, "samples_ms": [-1.0]}, r"line 2 is damaged.*samples_ms\[0\]"),
        (lambda row: {**row, "throughput_images_per_s": 0}, "line 2 is damaged.*throughput"),
        (lambda row: {**row, "attempt": 10**30}, "line 2 is damaged.*attempt"),
        (lambda row: {**row, "schema_version": 9}, "line 2 has schema version 9.*reads 3"),
        (lambda row: before_lockstep(row), "line 2 has schema version 2, .*reads 3; read it with"),
        (lambda row: {**row, "axes": {**row["axes"], "batch": 9}}, "line 2 was changed"),
        (lambda row: {**row, "id": "0" * 16}, "line 2 was changed"),
    ],
    ids=[
        "torn", "empty", "not a row", "unknown key", "missing key", "unknown status", "wrong type",
        "negative", "zero", "NaN", "infinite", "tiny", "huge", "sample", "throughput", "large",
        "other schema", "before lockstep", "edited axis", "edited id",
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(
    folder: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    damaged(folder, change)
    with pytest.raises(InvalidError, match=message) as refusal:
        read_run(folder)
    assert str(folder / "cells.jsonl") in str(refusal.value)


def test_an_error_that_is_not_among_the_errors_is_damage(folder: Path) -> None:
    cells = folder / "cells.jsonl"
    first, second = cells.read_text().splitlines()
    row = json.loads(first)
    row["correctness"]["worst"] = "nothing"
    cells.write_text(f"{json.dumps(row)}\n{second}\n")
    with pytest.raises(InvalidError, match=r"line 1 is damaged .worst is 'nothing'"):
        read_run(folder)


@pytest.mark.parametrize("name", ["cells.jsonl", "plan.json", "environment.json"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (lambda p: p.symlink_to("/dev/zero"), "a dev")],
    ids=["pipe", "folder", "device"],
)
def test_what_is_no_file_is_not_read(
    folder: Path, name: str, make: Callable[[Path], None], kind: str
) -> None:
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(UsageError, match=f"{name} cannot be read .it is {kind}"):
        read_run(folder)


def test_more_than_the_most_is_not_read(folder: Path) -> None:
    with (folder / "plan.json").open("ab") as file:
        file.truncate(2**26 + 1)  # sparse: it takes no room
    with pytest.raises(UsageError, match=r"plan\.json cannot be read .it has more than 64 MiB"):
        read_run(folder)


def test_a_row_that_nests_too_deep_is_damage(folder: Path) -> None:
    (folder / "cells.jsonl").write_text('{"x": ' + "[" * 100_000 + "\n")
    with pytest.raises(InvalidError, match="line 1 is damaged"):
        read_run(folder)


@pytest.mark.parametrize("made", [True, False])
def test_rows_are_not_appended_through_a_link(
    folder: Path, tmp_path: Path, plan: Plan, found: Environment, made: bool
) -> None:
    theirs = tmp_path / "theirs"
    if made:
        (folder / "cells.jsonl").rename(theirs)
        (folder / "cells.jsonl").symlink_to(theirs)
        before = theirs.read_bytes()
        with pytest.raises(UsageError, match=r"cells\.jsonl is a link"), resume_run(folder):
            pass
        assert theirs.read_bytes() == before
        return
    new = tmp_path / "new"
    new.mkdir()
    (new / "cells.jsonl").symlink_to(theirs)
    with pytest.raises(UsageError, match=r"cells\.jsonl is a link"), create_run(new, plan, found):
        pass
    assert not theirs.exists()


def test_a_run_begins_in_no_pipe(tmp_path: Path, plan: Plan, found: Environment) -> None:
    os.mkfifo(tmp_path / "cells.jsonl")
    with pytest.raises(UsageError, match="it is a pipe"), create_run(tmp_path, plan, found):
        pass


def test_links_in_place_of_plan_and_environment_are_replaced(
    tmp_path: Path, plan: Plan, found: Environment
) -> None:
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    for name in ("plan.json", "environment.json"):
        (run / name).symlink_to(theirs)
    with create_run(run, plan, found):
        pass
    assert not theirs.exists()
    assert (read_run(run).plan, read_run(run).environment) == (plan, found)


def test_a_folder_s_name_that_is_too_long_is_said(plan: Plan, found: Environment) -> None:
    long = Path("x" * 300)
    for opening in (create_run(long, plan, found), resume_run(long)):
        with pytest.raises(UsageError, match=r"cannot be written .File name too long"), opening:
            pass


def test_a_cell_twice_is_damage(folder: Path) -> None:
    cells = folder / "cells.jsonl"
    cells.write_text(cells.read_text() + cells.read_text().splitlines()[0] + "\n")
    with pytest.raises(InvalidError, match="line 3 repeats the cell of line 1"):
        read_run(folder)


def test_bytes_that_are_no_text_are_damage(folder: Path) -> None:
    with (folder / "cells.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    with pytest.raises(InvalidError, match="line 3 is damaged"):
        read_run(folder)


def test_a_damaged_environment_is_named(folder: Path) -> None:
    (folder / "environment.json").write_text('{"machine": 3}')
    with pytest.raises(InvalidError, match=r"environment\.json is damaged"):
        read_run(folder)


@pytest.mark.parametrize("missing", ["cells.jsonl", "environment.json", "plan.json"])
def test_what_is_no_run_folder_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=f"is not a run folder: {missing} cannot be read"):
        read_run(folder)


def test_the_default_folder_lies_in_the_checkout_around_here(tmp_path: Path) -> None:
    inside = tmp_path / "checkout" / "docs"
    inside.mkdir(parents=True)
    assert default_output("box", inside).parent == inside / "results" / "runs" / "box"
    (tmp_path / "checkout" / "pyproject.toml").write_text('[project]\nname = "resblock-bench"\n')
    found = default_output("box", inside)
    assert found.parent == tmp_path / "checkout" / "results" / "runs" / "box"
    assert default_output("box", inside) != found


def test_a_file_in_the_place_of_the_folder_is_named_as_such(
    tmp_path: Path, plan: Plan, found: Environment
) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    refusal = pytest.raises(UsageError, match="run is not a folder: give another --output")
    with refusal, create_run(path, plan, found):
        pass
    assert path.read_text() == "mine"
