"""Runs of made-up rows, in memory and on disk."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.made_rows import CALM, within

from resblock_bench.bench import files
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.records import Environment, Row, cell_id
from resblock_bench.bench.runs.folder import CELLS, ENVIRONMENT, PLAN, Run

VARIANTS = [(m, i) for m in ("none", "selective", "full") for i in ("reference", "fused")]


@pytest.fixture
def make_row(some_row: Callable[[str], Row]) -> Callable[..., Row]:
    """A row of a training step with fields of its own, or of its cell, changed.

    Without others, its times are those of `median_ms`, and its bytes those of `peak` and `kept`.
    """
    base = some_row("train")

    def make(median_ms: float = 10.0, peak: int = 2000, kept: int = 1000, **changes: object) -> Row:
        own = {name: changes.pop(name) for name in list(changes) if name in Row.__struct_fields__}
        cell = msgspec.structs.replace(base.axes, **changes)
        memory = msgspec.structs.replace(
            base.memory,
            baseline_bytes=500,
            peak_bytes=peak + 500,
            peak_above_baseline_bytes=peak,
            saved_for_backward_bytes=kept,
        )
        fields: dict[str, object] = {
            "axes": cell,
            "median_ms": median_ms,
            "ci_low_ms": median_ms * 0.9,
            "ci_high_ms": median_ms * 1.1,
            "throughput_images_per_s": cell.batch / median_ms * 1e3,
            "memory": memory,
            "conditions": CALM,
            "dirty": False,
            "stop_rule": "precision",
        }
        return msgspec.structs.replace(base, **{**fields, **own})

    return make


@pytest.fixture
def run(make_row: Callable[..., Row], plan: Plan, found: Environment, tmp_path: Path) -> Run:
    """Two sites in every variant."""
    rows = []
    for batch in (2, 4):
        for position, (mode, impl) in enumerate(VARIANTS):
            median = 10.0 + position
            rows.append(
                make_row(
                    median,
                    batch=batch,
                    impl=impl,
                    checkpoint=mode,
                    peak=2000 - 100 * position,
                    kept=1000 - 100 * position,
                    ratio=within((median - (impl == "fused")) / median),
                    ratio_to_none=within(10.0 / median),
                )
            )
    cells = [PlannedCell(row.axes, 1) for row in rows]
    return Run(tmp_path / "a-run", msgspec.structs.replace(plan, cells=cells), found, rows)


@pytest.fixture
def stored(run: Run) -> Callable[..., Path]:
    """Writes the first block's first rows of the run, or another run, as a folder, and names it."""
    short = dataclasses.replace(run, attempts=run.attempts[:2])

    def store(other: Run = short) -> Path:
        other.folder.mkdir(exist_ok=True)
        (other.folder / PLAN).write_bytes(files.as_json(other.plan))
        (other.folder / ENVIRONMENT).write_bytes(files.as_json(other.environment))
        rows = [
            msgspec.structs.replace(row, id=cell_id(row.axes, row.contract, row.code))
            for row in other.attempts
        ]
        (other.folder / CELLS).write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
        return other.folder

    return store
