"""Predicted beside measured: rows of a GPU that is not there, and costs that nobody compiled."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

pytest.importorskip("triton")

from rich.console import Console

from resblock_bench.bench.compiled.norms import DIRECTIONS, norms_of_block
from resblock_bench.bench.cost import predicted_run
from resblock_bench.bench.cost.gpu_figures import GPUS, architecture, gpu_that_copies
from resblock_bench.bench.cost.predictions import Predicted
from resblock_bench.bench.machine.workers import JobFailed
from resblock_bench.bench.records import Row

OURS = {"forward": 10.0, "rewrite": 7.0, "backward": 20.0}
EAGER = {"forward": 100.0, "rewrite": 1e9, "backward": 200.0}


def predicted(direction: str) -> Predicted:
    return Predicted(
        us=OURS[direction],
        bound="memory",
        shares_us={"memory": OURS[direction]},
        floor_us=5.0,
        floor_share=5.0 / OURS[direction],
        larger_than_l2=False,
        eager_us=EAGER[direction],
        eager_kernels=9,
        compiled_us=15.0,
        host_us=None,
    )


@pytest.fixture
def make_row(some_row: Callable[[str], Row]) -> Callable[..., Row]:
    """A row as of an H100: how it was timed and what is asked of the cell changed."""

    def make(median_ms: float, device_name: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> Row:
        row = some_row("train")
        return msgspec.structs.replace(
            row,
            axes=msgspec.structs.replace(row.axes, **changes),
            contract=msgspec.structs.replace(row.contract, device="cuda"),
            device_name=device_name,
            median_ms=median_ms,
            status="ok",
        )

    return make


def besides(rows: list[Row]) -> list[predicted_run.Beside]:
    known = {
        (norm, direction): predicted(direction)
        for row in rows
        for norm in norms_of_block(row.axes)
        for direction in DIRECTIONS
    }
    return predicted_run.beside(rows, known)


@pytest.mark.parametrize(
    ("checkpoint", "ours", "eager"),
    [
        # Of two norms: forward and backward; the activation rewritten; the forward run again.
        ("none", 2 * (10 + 20), 2 * (100 + 200)),
        ("selective", 2 * (10 + 7 + 20), 2 * (100 + 100 + 200)),
        ("full", 2 * (10 + 10 + 20), 2 * (100 + 100 + 200)),
    ],
)
def test_what_the_norms_save(
    make_row: Callable[..., Row], checkpoint: str, ours: float, eager: float
) -> None:
    rows = [
        make_row(2.0, impl="reference", checkpoint=checkpoint),
        make_row(1.4, impl="fused", checkpoint=checkpoint),
    ]
    (found,) = besides(rows)
    assert found.norms_us == ours
    assert found.saving_us == eager - ours
    assert found.step_us == pytest.approx(1400)
    assert found.measured_saving_us == pytest.approx(600)


def test_nothing_measured_to_compare_with(make_row: Callable[..., Row]) -> None:
    """Another checkpoint mode's reference is no peer, nor is one that failed."""
    failed = msgspec.structs.replace(make_row(2.0, impl="reference"), status="failed")
    other = make_row(2.0, impl="reference", checkpoint="full")
    (found,) = besides([failed, other, make_row(1.4, impl="fused")])
    assert found.measured_saving_us is None


def test_only_fused_cells_of_known_gpus(make_row: Callable[..., Row]) -> None:
    cpu = make_row(1.0, impl="fused")
    cpu = msgspec.structs.replace(cpu, contract=msgspec.structs.replace(cpu.contract, device="cpu"))
    rows = [
        cpu,
        make_row(1.0, impl="fused", device_name="NVIDIA GeForce RTX 4090"),
        msgspec.structs.replace(make_row(1.0, impl="fused"), status="wrong"),
        make_row(1.0, impl="compiled"),
    ]
    assert predicted_run.predicted_cells(rows) == []
    said = io.StringIO()
    predicted_run.show(rows, None, Console(file=said), 100)  # compiles nothing
    assert said.getvalue() == ""


def test_the_table_fits_and_says_predicted(
    make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_row(2.0, impl="reference"), make_row(1.4, impl="fused")]
    norms = list(norms_of_block(rows[1].axes))
    known = {(norm, d): predicted(d) for norm in norms for d in DIRECTIONS}
    asked: list[Any] = []

    def gather(*arguments: Any, **options: Any) -> tuple[list[Any], list[str]]:
        asked.append((*arguments[:2], options))
        return [], []

    monkeypatch.setattr(predicted_run, "gather", gather)
    monkeypatch.setattr(predicted_run, "predictions_of", lambda costs, gpu: known)
    said = io.StringIO()
    predicted_run.show(rows, None, Console(file=said, width=100), 100)
    assert asked == [(norms, [90], {"by_rule": True})]
    text = said.getvalue()
    assert "predicted beside measured" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "1,400" in text and "600" in text and "540" in text


def test_a_kernel_that_does_not_compile_leaves_the_run(
    make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch, found: Any
) -> None:
    from resblock_bench.bench.sweep import sweep

    def gather(*arguments: Any, **options: Any) -> Any:
        raise JobFailed("no ptxas")

    monkeypatch.setattr(predicted_run, "gather", gather)
    said = io.StringIO()
    sweep._show_predicted([make_row(1.4, impl="fused")], found, Console(file=said))
    assert "nothing is predicted of the norms: no ptxas" in said.getvalue()


def test_names_of_gpus() -> None:
    assert architecture("NVIDIA A100-SXM4-80GB") == 80
    assert architecture("NVIDIA H100 80GB HBM3") == 90
    assert architecture("NVIDIA B200") == 100
    assert architecture("NVIDIA GeForce RTX 4090") is None
    assert architecture("AMD EPYC 7713") is None


def test_the_bandwidth_is_the_one_that_was_measured() -> None:
    assert gpu_that_copies(90, None) == GPUS[90]
    assert gpu_that_copies(90, 4e12) == GPUS[90]._replace(copy_bytes_per_s=4e12)
