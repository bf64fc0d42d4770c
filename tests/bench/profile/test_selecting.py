"""Cells by id and by axes, and what is said of one that there is not."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.profile.selecting import selected
from resblock_bench.bench.records import Row


@pytest.fixture
def run_folder(some_row: Callable[[str], Row], tmp_path: Path) -> tuple[Path, Row]:
    row = some_row("train")
    lines = [b"no row", msgspec.json.encode(row), b'{"id": 1}']
    (tmp_path / "cells.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path, row


def test_a_row_is_found_by_its_id(run_folder: tuple[Path, Row]) -> None:
    folder, row = run_folder
    assert selected([row.id], [], folder, folder) == [row.axes]


def test_so_is_one_in_the_runs_of_the_checkout(run_folder: tuple[Path, Row]) -> None:
    folder, row = run_folder
    runs = folder / "results" / "runs" / "machine" / "run"
    runs.mkdir(parents=True)
    (folder / "cells.jsonl").rename(runs / "cells.jsonl")
    assert selected([row.id], [], None, folder) == [row.axes]


def test_an_id_that_no_row_has_names_the_nearest(run_folder: tuple[Path, Row]) -> None:
    folder, row = run_folder
    other = ("1" if row.id[0] == "0" else "0") + row.id[1:]
    with pytest.raises(UsageError, match=f"has the id {other}: the nearest of 1 are {row.id}"):
        selected([other], [], folder, folder)
    with pytest.raises(UsageError, match=r"no row of 0 run folders .*there are no rows"):
        selected([other], [], None, folder / "elsewhere")


def test_axes_name_a_cell_and_common_axes_are_those_of_both() -> None:
    words = ["impl=reference", "impl=fused checkpoint=selective"]
    one, other = selected(words, ["channels=64", "resolution=8"], None, Path())
    assert (one.impl, one.checkpoint, one.channels) == ("reference", "none", 64)
    assert (other.impl, other.checkpoint, other.resolution) == ("fused", "selective", 8)
    both = selected([], ["channels=64"], None, Path())
    assert [cell.impl for cell in both] == ["reference", "fused"]
    (model,) = selected(["model=iddpm-cifar10-uncond workload=model impl=fused"], [], None, Path())
    assert model.workload == "model"


@pytest.mark.parametrize(
    ("words", "arguments", "message"),
    [
        ([], [], "2 cells were named, such as 128 32² b8"),
        (["model=iddpm-cifar10-uncond"], [], r"\d+ cells were named.*workload=model"),
        (["0123"], [], "'0123' is neither a cell's id, 16 hexadecimal digits, nor axes"),
        (["fused"], [], "'fused' is neither"),
        (["impl=fusd"], [], "did you mean 'fused'"),
        (["chanels=3"], [], "did you mean 'channels'"),
        (["impl=fused"], ["model=iddpm-cifar10-uncond", "channels=100"], "it is one of"),
        (["dims=1 layout=nhwc impl=fused"], [], "cannot be run: PyTorch has no channels-last"),
    ],
)
def test_what_is_no_cell_is_refused(words: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        selected(words, arguments, None, Path())
