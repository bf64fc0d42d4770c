"""What follows from few predictions is what each of the cells would be predicted to need."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from resblock_bench.bench.measure import scaled_memory
from resblock_bench.bench.measure.predict_memory import MemoryOracle, predict_memory
from resblock_bench.bench.measure.scaled_memory import ScaledMemory
from resblock_bench.bench.records import Cell

MakeCell = Callable[..., Cell]


def grid(make_cell: MakeCell, **fixed: Any) -> list[Cell]:
    return [
        make_cell(batch=batch, resolution=size, channels=64, out_channels=out, **fixed)
        for batch, size, out in product((2, 5), (4, 6, 9), (96, 256))
    ]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that are predicted by themselves."""
    cells: list[Cell] = []

    def noted(cell: Cell) -> object:
        cells.append(cell)
        return predict_memory(cell)

    class Noted(MemoryOracle):
        memory = staticmethod(noted)  # type: ignore[assignment]

    monkeypatch.setattr(scaled_memory, "predict_memory", noted)
    monkeypatch.setattr(scaled_memory, "MemoryOracle", Noted)
    return cells


@pytest.mark.parametrize(
    "fixed",
    [
        {"checkpoint": "none"},
        {"checkpoint": "selective", "dtype": "fp16", "dropout": 0.3},
        {"checkpoint": "full", "conditioning": "add", "layout": "nhwc"},
        {"mode": "forward", "dims": 1},
        {"mode": "inference", "dims": 3, "updown": "up"},
    ],
    ids=lambda fixed: " ".join(map(str, fixed.values())),
)
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_the_bytes_are_those_of_each_cells_own_prediction(
    make_cell: MakeCell, predicted: list[Cell], impl: str, fixed: dict[str, Any]
) -> None:
    cells = grid(make_cell, impl=impl, **fixed)
    if impl == "fused" and "layout" in fixed:  # goes image by image
        cells = [make_cell(channels=c, batch=3, impl=impl, **fixed) for c in range(64, 256, 32)]
    predictions = ScaledMemory(cells)
    found = {cell: predictions.memory(cell) for cell in cells}
    assert len(predicted) == 1
    for cell in cells[1::3]:
        assert found[cell] == predict_memory(cell), cell


def test_down_sampling_scales_by_half_of_even_resolutions(
    make_cell: MakeCell, predicted: list[Cell]
) -> None:
    cells = [make_cell(resolution=r, updown="down", channels=64) for r in (4, 6, 8, 10, 12, 7)]
    predictions = ScaledMemory(cells)
    assert [predictions.memory(cell) for cell in cells] == list(map(predict_memory, cells))
    assert len(predicted) == 2


def test_a_size_of_one_is_of_another_kind(make_cell: MakeCell) -> None:
    cells = [make_cell(resolution=r, batch=b, channels=64) for r in (1, 2, 4) for b in (1, 2, 3)]
    predictions = ScaledMemory(cells)
    assert [predictions.memory(cell) for cell in cells] == list(map(predict_memory, cells))


def test_equal_blocks_of_two_models_are_predicted_once(
    make_cell: MakeCell, predicted: list[Cell]
) -> None:
    cells = [make_cell(model=model) for model in ("one", "another")]
    predictions = ScaledMemory(cells)
    assert predictions.memory(cells[0]) == predictions.memory(cells[1])
    assert len(predicted) == 1


def test_what_another_package_builds_is_predicted_cell_by_cell(
    make_cell: MakeCell, add_implementation: Callable[..., None]
) -> None:
    """Its operations may depend on the sizes in any way."""

    def around(module: torch.nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        return torch.cat([module(x, emb)] * (3 if x.shape[0] == 4 else 1))[: len(x)]

    add_implementation("moody", around)
    cells = [make_cell(impl="moody", batch=batch, mode="inference") for batch in range(2, 8)]
    predictions = ScaledMemory(cells)
    assert [predictions.memory(cell) for cell in cells] == list(map(predict_memory, cells))


def test_where_the_operations_depend_on_the_sizes_every_cell_is_predicted_by_itself(
    make_cell: MakeCell,
    add_implementation: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    predicted: list[Cell],
) -> None:
    def around(module: torch.nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        return torch.cat([module(x, emb), *([x] * 40 if len(x) > 500 else [])])[: len(x)]

    add_implementation("moody", around)
    monkeypatch.setattr(scaled_memory, "_SCALED", ("moody",))
    cells = [make_cell(impl="moody", batch=batch, mode="inference") for batch in range(2, 8)]
    predictions = ScaledMemory(cells)
    assert [predictions.memory(cell) for cell in cells] == list(map(predict_memory, cells))
    assert set(predicted) >= set(cells)
