import typing
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console

from resblock_bench.bench.records import Floor, Row, Status
from resblock_bench.bench.runs.table import (
    WIDTH,
    disturbed,
    problems,
    results_table,
    speed_ratio,
    summary,
)


def shown(rows: list[Row], width: int = WIDTH) -> str:
    console = Console(width=width, record=True, force_terminal=False, file=None, quiet=False)
    with console.capture() as capture:
        console.print(results_table(rows))
    return capture.get()


@pytest.fixture
def make_row(some_row: Callable[[str], Row]) -> Callable[..., Row]:
    """A measured row with another cell and another median."""
    base = some_row("inference")

    def make(median_ms: float | None, status: str = "ok", **axes: object) -> Row:
        cell = msgspec.structs.replace(base.axes, **axes)
        changes: dict[str, object] = {"axes": cell, "status": status, "median_ms": median_ms}
        if median_ms is None:
            changes |= {"throughput_images_per_s": None, "reason": f"why {status}"}
        else:
            changes["throughput_images_per_s"] = cell.batch / median_ms * 1e3
        return msgspec.structs.replace(base, **changes)

    return make


def test_the_ratio_is_to_the_reference_in_the_same_mode(make_row: Callable[..., Row]) -> None:
    rows = [
        make_row(10.0),
        make_row(20.0, checkpoint="full"),
        make_row(5.0, impl="fused", checkpoint="full"),
    ]
    assert speed_ratio(rows[2], rows) == pytest.approx(4.0)
    assert speed_ratio(rows[1], rows) == 1.0


@pytest.mark.parametrize("status", [s for s in typing.get_args(Status) if s != "ok"])
def test_without_a_measured_peer_there_is_no_ratio(
    make_row: Callable[..., Row], status: str
) -> None:
    rows = [make_row(None, status), make_row(5.0, impl="fused")]
    assert speed_ratio(rows[1], rows) is None
    assert speed_ratio(rows[0], rows) is None
    assert status in shown(rows)


def test_an_impossible_time_makes_no_ratio(make_row: Callable[..., Row]) -> None:
    rows = [make_row(10.0), make_row(1e-3, "impossible", impl="fused")]
    assert speed_ratio(rows[1], rows) is None
    assert "fused runs" not in summary(rows, 2)
    rows = [make_row(1e-3, "impossible"), make_row(10.0, impl="fused")]
    assert speed_ratio(rows[1], rows) is None


def test_the_longest_rows_fit_the_width(make_row: Callable[..., Row]) -> None:
    long = {
        "model": "iddpm-upsample-64-256-cond",
        "channels": 1024,
        "out_channels": 1536,
        "resolution": 512,
        "batch": 2048,
        "updown": "down",
        "dropout": 0.125,
        "conditioning": "add",
    }
    rows = [
        make_row(0.001, checkpoint="selective", **long),
        make_row(1e6, impl="reference_of_a_long_name", checkpoint="selective", **long),
    ]
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "2,048,000,000.0" in text


def test_memory_and_error_stand_in_the_table(make_row: Callable[..., Row]) -> None:
    row = make_row(10.0)
    assert row.memory is not None
    memory = msgspec.structs.replace(
        row.memory, peak_above_baseline_bytes=3 * 2**20, saved_for_backward_bytes=2**19
    )
    text = shown([msgspec.structs.replace(row, memory=memory)])
    assert "3.00" in text
    assert "0.50" in text
    assert "e-0" in text


def test_problems_are_grouped_with_their_reason(make_row: Callable[..., Row]) -> None:
    rows = [make_row(1.0), make_row(None, "oom"), make_row(None, "oom", batch=3)]
    assert problems(rows) == ["oom: reference, 2 cells: why oom"]


def test_the_summary_counts_and_shows_the_range(make_row: Callable[..., Row]) -> None:
    rows = [
        make_row(10.0),
        make_row(5.0, impl="fused"),
        make_row(10.0, batch=3),
        make_row(20.0, impl="fused", batch=3),
        make_row(10.0, batch=4),
        make_row(None, "oom", impl="fused", batch=4),
    ]
    text = summary(rows, 7)
    assert text.startswith("6 of 7 cells: 5 ok, 1 oom; ")
    assert "fused runs at 1.00× the reference (0.50–2.00 over 2 of 3)" in text


def test_a_disturbed_cell_is_marked_and_told(make_row: Callable[..., Row]) -> None:
    calm = make_row(10.0)
    assert calm.conditions is not None
    conditions = msgspec.structs.replace(calm.conditions, disturbances=["others took 1.5 CPUs"])
    calm = msgspec.structs.replace(
        calm, conditions=msgspec.structs.replace(conditions, disturbances=[])
    )
    shaken = msgspec.structs.replace(make_row(5.0, impl="fused"), conditions=conditions)
    assert disturbed([calm]) is None
    assert "fused none !" in shown([calm, shaken])
    assert "reference none !" not in shown([calm, shaken])
    text = disturbed([calm, shaken]) or ""
    assert text.startswith("! 1 of 2 cells were disturbed")
    assert "others took 1.5 CPUs" in text


def test_the_share_of_the_floor_is_shown(make_row: Callable[..., Row]) -> None:
    floor = Floor(bytes=1, flops=1, bytes_ms=0.1, flops_ms=0.2, share=0.37)
    assert "37%" in shown([msgspec.structs.replace(make_row(10.0), floor=floor)])


@pytest.mark.parametrize("width", [20, 40, 60])
def test_names_stay_on_a_narrow_terminal(make_row: Callable[..., Row], width: int) -> None:
    assert "reference" in shown([make_row(10.0)], width)


def test_one_cell_is_not_many(make_row: Callable[..., Row]) -> None:
    assert summary([make_row(10.0)]).startswith("1 cell: 1 ok")
    assert summary([make_row(10.0)], 1).startswith("1 of 1 cell: 1 ok")
