"""Predicted beside measured, after a run on a GPU that the model has figures of.

A step is convolutions for the most part, which nothing here predicts. What compares with a
measurement is what the fused norms save: eager's chain less the fused launches, predicted, beside
the reference's step less the fused one's, measured. The prediction takes every kernel of eager's
at its best and leaves out what else the fused block does (its folded bias, its residual addition),
so a measured saving above it is no surprise; one below speaks against the model or the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from resblock_bench.bench.compiled.norms import Direction, Norm, norms_of_block
from resblock_bench.bench.records import Ceilings, Cell, Row, site_name, variant_name
from resblock_bench.bench.runs.table import by_site
from resblock_bench.kernels.tiers import Launch

from .costs import Cost, gather
from .gpu_figures import GpuFigures, architecture, gpu_that_copies
from .predictions import Predicted, predict
from .table import empty


class Beside(NamedTuple):
    """One fused cell: its step as measured, its norms as predicted, and what they save."""

    cell: Cell
    step_us: float
    norms_us: float
    saving_us: float
    measured_saving_us: float | None


def fused_directions(cell: Cell) -> list[Direction]:
    """How often a step of the fused block runs its norms, and how."""
    if cell.mode != "train":
        return ["forward"]
    again: dict[str, list[Direction]] = {
        "none": [],
        "selective": ["rewrite"],
        "full": ["forward"],
    }
    return ["forward", *again[cell.checkpoint], "backward"]


def reference_directions(cell: Cell) -> list[Direction]:
    """The same of the reference, which recomputes norms with any checkpoint."""
    if cell.mode != "train":
        return ["forward"]
    if cell.checkpoint == "none":
        return ["forward", "backward"]
    return ["forward", "forward", "backward"]


def predicted_cells(rows: Sequence[Row]) -> list[Row]:
    """The rows that have something to be compared with: measured, fused, on a known GPU."""
    return [
        row
        for row in rows
        if row.status == "ok"
        and row.median_ms is not None
        and row.axes.impl == "fused"
        and row.axes.workload == "block"
        and row.contract.device == "cuda"
        and architecture(row.device_name) is not None
    ]


Predictions = Mapping[tuple[Norm, Direction], Predicted]


def beside(rows: Sequence[Row], predictions: Predictions) -> list[Beside]:
    """Every such row with what is predicted of its norms."""
    found = []
    for members in by_site(rows).values():
        for row in predicted_cells(members):
            assert row.median_ms is not None
            norms = norms_of_block(row.axes)
            own = sum(predictions[n, d].us for n in norms for d in fused_directions(row.axes))
            eager = sum(
                predictions[n, d].eager_us for n in norms for d in reference_directions(row.axes)
            )
            peer_us = _reference_us(row, members)
            step_us = 1e3 * row.median_ms
            saved_us = None if peer_us is None else peer_us - step_us
            found.append(Beside(row.axes, step_us, own, eager - own, saved_us))
    return found


def _reference_us(row: Row, members: Sequence[Row]) -> float | None:
    """The reference's step in the same checkpoint mode."""
    for other in members:
        same = other.axes.checkpoint == row.axes.checkpoint
        if other.axes.impl == "reference" and same and other.status == "ok" and other.median_ms:
            return 1e3 * other.median_ms
    return None


def predictions_of(
    costs: Sequence[Cost], gpu: GpuFigures
) -> dict[tuple[Norm, Direction], Predicted]:
    """Predicted for one GPU rather than for the one that stands for its architecture."""
    return {
        (cost.norm, cost.direction): predict(
            cost.norm,
            cost.direction,
            cost.arch,
            Launch(**cost.launch),
            cost.traffic,
            cost.kernels,
            gpu=gpu,
        )
        for cost in costs
    }


def table(found: Sequence[Beside]) -> Table:
    view = empty("the norms of the fused block: predicted beside measured", "block, variant", 40)
    for heading in (
        "step µs",
        "norms µs, predicted",
        "they save µs, predicted",
        "saved µs, measured",
    ):
        view.add_column(heading, justify="right", max_width=12)
    for item in found:
        measured = "–" if item.measured_saving_us is None else f"{item.measured_saving_us:,.0f}"
        view.add_row(
            f"{site_name(item.cell)} {item.cell.dtype} {item.cell.layout} {item.cell.mode} "
            f"{variant_name(item.cell)}",
            f"{item.step_us:,.0f}",
            f"{item.norms_us:,.0f}",
            f"{item.saving_us:,.0f}",
            measured,
        )
    return view


def show(rows: Sequence[Row], ceilings: Ceilings | None, console: Console, width: int) -> None:
    """Compile what the rows ran, predict it, and print it beside what was measured."""
    chosen = predicted_cells(rows)
    if not chosen:
        return
    arch = architecture(chosen[0].device_name)
    assert arch is not None
    norms = list(dict.fromkeys(norm for row in chosen for norm in norms_of_block(row.axes)))
    costs, _ = gather(norms, [arch], None, console, by_rule=True)
    found = beside(
        rows,
        predictions_of(
            costs, gpu_that_copies(arch, ceilings.copy_bytes_per_s if ceilings else None)
        ),
    )
    console.print(table(found), width=min(console.width, width))
