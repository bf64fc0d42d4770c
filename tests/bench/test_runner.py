from collections.abc import Callable

import pytest

from resblock_bench.bench.grid import PlannedCell
from resblock_bench.bench.records import Cell
from resblock_bench.bench.runner import run_cells


@pytest.fixture
def planned(make_cell: Callable[..., Cell]) -> list[PlannedCell]:
    return [PlannedCell(make_cell(batch=batch), 1) for batch in (1, 2, 3, 4)]


def test_rows_come_in_order_and_only_when_asked_for(planned: list[PlannedCell]) -> None:
    measured: list[int] = []

    def measure(item: PlannedCell) -> int:
        measured.append(item.cell.batch)
        return item.cell.batch

    rows = run_cells(planned, measure)  # type: ignore[arg-type]
    assert next(rows) == 1
    assert measured == [1]
    assert list(rows) == [2, 3, 4]


def test_a_budget_ends_the_run_between_two_cells(planned: list[PlannedCell]) -> None:
    now_s = 0.0

    def measure(item: PlannedCell) -> int:
        nonlocal now_s
        now_s += 10
        return item.cell.batch

    rows = run_cells(planned, measure, budget_s=15, clock=lambda: now_s)  # type: ignore[arg-type]
    assert list(rows) == [1, 2]


def test_without_a_budget_everything_is_measured(planned: list[PlannedCell]) -> None:
    ticks = iter(range(0, 10**9, 10**6))
    rows = run_cells(planned, lambda item: item, clock=lambda: next(ticks))  # type: ignore
    assert len(list(rows)) == 4
