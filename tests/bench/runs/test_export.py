import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pandas
import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.records import Conditions, Environment, Row
from resblock_bench.bench.runs.export import export, parse_formats
from resblock_bench.bench.runs.folder import Run

HARD = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 123456789.12345679]
"""Floats that lose bits wherever fewer than 17 digits are written."""
TIMES = ("median_ms", "ci_low_ms", "warmup_s", "ci_high_ms", "wall_s")

# Pandas 3 reads every digit anyway, and deprecates being asked to.
EXACT = {} if int(pandas.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}


@pytest.fixture
def run(some_row: Callable[[str], Row], plan: Plan, found: Environment, tmp_path: Path) -> Run:
    """A measured cell, one without numbers, and one whose integers need all of a float's bits."""
    measured = some_row("inference")
    assert measured.memory is not None
    empty = {"median_ms": None, "samples_ms": None, "memory": None, "outliers": None}
    broken = msgspec.structs.replace(
        measured,
        axes=msgspec.structs.replace(measured.axes, checkpoint="full"),
        status="oom",
        reason="a | b <c>\nsecond, 'line'",
        correctness=None,
        **empty,
    )
    memory = msgspec.structs.replace(measured.memory, peak_bytes=2**53 + 1)
    conditions = Conditions(
        **{
            **dict.fromkeys(Conditions.__struct_fields__),
            "source": "here",
            "cpu_mhz": (0.1 + 0.2, 2000.0),
            "disturbances": ["one", "two"],
            "notes": [],
        }
    )
    large = msgspec.structs.replace(
        measured,
        axes=msgspec.structs.replace(measured.axes, impl="fused"),
        samples_ms=HARD,
        **dict(zip(TIMES, HARD, strict=True)),
        memory=memory,
        conditions=conditions,
    )
    return Run(tmp_path, plan, found, [measured, broken, large])


def leaves(record: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings flattened by hand, to compare with."""
    found: dict[str, object] = {}
    for name, value in record.items():
        if isinstance(value, dict) and name not in ("versions", "errors", "limits"):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def check(run: Run, frame: pandas.DataFrame, lists: Callable[[object], object]) -> None:
    """Every leaf of every row stands in the frame, with its type and all its bits."""
    assert len(frame) == len(run.rows)
    for row, (_, got) in zip(run.rows, frame.iterrows(), strict=True):
        for name, value in leaves(msgspec.to_builtins(row)).items():
            if name not in frame:
                assert value is None, name  # a struct that is missing has columns, not itself
                assert any(column.startswith(f"{name}.") for column in frame), name
                continue
            found = got[name]
            if value is None:
                assert pandas.api.types.is_scalar(found), name
                assert pandas.isna(found), name
            elif isinstance(value, dict):
                assert json.loads(found) == value
            elif isinstance(value, list | tuple):
                assert lists(found) == list(value)
            else:
                assert found == value, name
    assert frame["axes.batch"].dtype == "Int64"
    assert frame["memory.peak_bytes"].dtype == "Int64"
    assert frame["memory.peak_bytes"][2] == 2**53 + 1  # not a float's nearest, 2**53
    assert frame["median_ms"].dtype == "Float64"


def test_csv_gives_back_every_bit(run: Run) -> None:
    (path,) = export(run, ["csv"])
    assert path == run.folder / "cells.csv"
    # Digests, of which some look like numbers: 12e3, say.
    digests = dict.fromkeys(("id", "code", "commit"), "string")
    frame = pandas.read_csv(path, dtype_backend="numpy_nullable", dtype=digests, **EXACT)
    check(run, frame, json.loads)


def test_parquet_gives_back_every_bit(run: Run) -> None:
    (path,) = export(run, ["parquet"])
    check(run, pandas.read_parquet(path), list)


def test_the_columns_do_not_depend_on_the_rows(run: Run) -> None:
    from pyarrow import parquet

    export(run, ["csv", "parquet"])
    header = (run.folder / "cells.csv").read_text().splitlines()[0]
    schema = parquet.read_schema(run.folder / "cells.parquet").remove_metadata()
    assert header.split(",") == schema.names
    assert {"axes.dims", "contract.timer", "floor.share", "conditions.energy_j"} <= set(
        schema.names
    )
    for rows in (run.rows[1:2], []):
        export(dataclasses.replace(run, attempts=rows), ["csv", "parquet"])
        assert (run.folder / "cells.csv").read_text().splitlines()[0] == header
        assert parquet.read_schema(run.folder / "cells.parquet").remove_metadata() == schema


def test_markdown_is_a_table_with_its_summary(run: Run) -> None:
    (path,) = export(run, ["md"])
    text = path.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(run.rows)
    unescaped = {line.replace("\\|", "").count("|") for line in table}
    assert unescaped == {11}, "every line has as many cells as the heading"
    assert "reference none" in table[2]
    assert "oom" in table[3]
    assert "- oom: reference, 1 cell: a \\| b &lt;c&gt; second, 'line'" in text
    assert "3 cells: 2 ok, 1 oom" in text
    assert f"torch {run.environment.versions['torch']}" in text


def test_an_empty_run_has_a_heading(run: Run) -> None:
    (path,) = export(dataclasses.replace(run, attempts=[]), ["md"])
    assert "0 cells: none." in path.read_text()


def test_markdown_steers_nothing_and_csv_keeps_what_is_stored(run: Run) -> None:
    row = msgspec.structs.replace(run.rows[1], reason="\x1b[31mred\x07")
    export(dataclasses.replace(run, attempts=[row]), ["md", "csv"])
    assert "1 cell: \\[31mred" in (run.folder / "cells.md").read_text()
    assert "\x1b[31mred\x07" in (run.folder / "cells.csv").read_text()


def test_an_export_into_a_foreign_folder_follows_no_link(run: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    for name in ("cells.csv", "cells.csv.part", "cells.md"):
        (run.folder / name).symlink_to(theirs)
    export(run, ["csv", "md"])
    assert not theirs.exists()


def test_an_environment_without_versions_is_exported(run: Run) -> None:
    bare = msgspec.structs.replace(run.environment, versions={})
    export(dataclasses.replace(run, environment=bare), ["md"])
    assert "torch None, triton None" in (run.folder / "cells.md").read_text()


def test_a_failed_write_leaves_the_earlier_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = export(run, ["csv"])
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cells\.csv cannot be written \(No space left"):
        export(dataclasses.replace(run, attempts=[]), ["csv"])
    assert path.read_bytes() == before


def test_a_comma_list_of_formats() -> None:
    assert parse_formats("csv, md,csv,parquet") == ["csv", "md", "parquet"]


@pytest.mark.parametrize("text", ["cvs", "", "csv,", "CSV"])
def test_another_format_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown format .* it is one of csv, parquet, md"):
        parse_formats(text)


def test_parquet_without_its_package_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: parse_formats("csv,parquet"), lambda: export(run, ["csv", "parquet"])):
        with pytest.raises(UsageError, match=r"pip install 'resblock-bench\[parquet\]'"):
            attempt()
    assert list(run.folder.iterdir()) == []
