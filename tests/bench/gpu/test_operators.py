"""The operator's sweep, on a CPU and at one tiny norm: what becomes of each implementation."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from resblock_bench.bench.compiled.norms import Norm
from resblock_bench.bench.gpu import operators, steps
from resblock_bench.bench.gpu.operators import OperatorRow, Site, Sweep, read_rows
from resblock_bench.bench.measure import operator

pytest.importorskip("triton")
NORM = Norm(
    batch=2, channels=32, positions=16, groups=8, dtype="fp32", layout="nchw",
    modulation="scale_shift", bias_folded=False, dropout=0.0,
)  # fmt: skip
SITE = Site(NORM, "a-model", 4, 512)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[OperatorRow]]:
    """The rows of a call of the sweep; all calls of a test write into one file."""
    short = replace(operators.SAMPLING, warmup_s=0.0, warmup_max_s=0.0, max_time_s=0.0)
    monkeypatch.setattr(operators, "SAMPLING", short)

    def measure(*impls: str, seconds: float = 60.0) -> list[OperatorRow]:
        sweep = Sweep(tmp_path / "rows.jsonl", "rules", "cpu", time.monotonic() + seconds)
        return list(sweep.site(SITE, impls))

    return measure


def kept(tmp_path: Path) -> list[OperatorRow]:
    return read_rows(tmp_path / "rows.jsonl")


def test_both_directions_are_checked_timed_and_kept_and_not_measured_again(
    measured: Callable[..., list[OperatorRow]], tmp_path: Path
) -> None:
    rows = measured("eager", "fused")
    assert [(row.impl, row.direction, row.status) for row in rows] == [
        (impl, way, "ok") for impl in ("eager", "fused") for way in ("forward", "backward")
    ]
    forward, backward = rows[2:]
    # x and y, an affine and a scale and shift in fp32; then dy beside them, and a gradient of each.
    read = 4 * (2 * 32 * 16 + 2 * 32 + 2 * 2 * 32)
    assert (forward.bytes, backward.bytes) == (read + 4096, 2 * read + 4096)
    for row in rows:
        assert row.share == pytest.approx(row.bytes / row.copy_bytes_per_s * 1e6 / row.median_us)
        assert row.low_us <= row.median_us <= row.high_us and row.error < 1e-5
    assert kept(tmp_path) == rows
    assert measured("eager", "fused") == []


def test_what_is_wrong_is_said_and_not_timed(
    measured: Callable[..., list[OperatorRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "fused", lambda *call: 1.001 * operator.eager(*call))
    for row in measured("fused"):
        assert (row.status, row.median_us) == ("wrong", None)
        assert "has a relative error of 0.001" in (row.reason or "")


def test_what_raises_is_a_row_and_the_next_is_measured(
    measured: Callable[..., list[OperatorRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*call: object) -> Tensor:
        raise RuntimeError("no such launch")

    monkeypatch.setattr(operators, "fused", refuse)
    rows = measured("fused", "eager")
    assert [row.status for row in rows] == ["failed", "failed", "ok", "ok"]
    assert rows[0].reason == "RuntimeError: no such launch"


def test_what_ended_the_process_is_left_out(
    measured: Callable[..., list[OperatorRow]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*call: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(operators, "fused", end)
        measured("fused")
    assert [row.status for row in kept(tmp_path)] == ["begun", "begun"]
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"label":"ru')  # and in the middle of a line
    assert [row.impl for row in measured("fused", "eager")] == ["eager", "eager"]
    assert [row.status for row in kept(tmp_path)] == ["begun", "begun", "ok", "ok"]


def test_a_peer_that_is_not_installed_is_skipped_with_what_to_do(
    measured: Callable[..., list[OperatorRow]],
) -> None:
    rows = measured("apex")
    assert [row.status for row in rows] == ["skipped", "skipped"]
    assert "build NVIDIA's apex from source" in (rows[0].reason or "")


def test_nothing_is_begun_once_the_time_is_spent(
    measured: Callable[..., list[OperatorRow]], tmp_path: Path
) -> None:
    assert measured("eager", seconds=0.0) == kept(tmp_path) == []


def test_a_sweep_says_so_where_the_time_is_spent_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is done by then is over: its rows are all there."""
    monkeypatch.setattr(operators, "COPY_ELEMENTS", {"cpu": 2**10})
    monkeypatch.setattr(operators, "chosen", lambda sites, count: [SITE])
    now = iter([0.0, 0.0, 9.0])
    monkeypatch.setattr(operators, "time", SimpleNamespace(monotonic=lambda: next(now)))
    operators.main(tmp_path / "rows.jsonl", time_budget=5, device="cpu", stages="apex")
    assert steps.SPENT not in capsys.readouterr().out
    now = iter([0.0, 9.0, 9.0])
    operators.main(tmp_path / "rows.jsonl", time_budget=5, device="cpu", stages="eager")
    assert steps.SPENT in capsys.readouterr().out


@pytest.mark.slow
def test_every_shape_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one function Dynamo compiles so many shapes only, and then would run it eagerly."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_with(f, backend=backend, **how))
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch in range(2, 6):
            norm = replace(NORM, batch=batch)
            inputs = operators.inputs_of(norm, 4, torch.device("cpu"))
            call = operators.implementation("compiled", norm, torch.device("cpu"))
            call(inputs.x, inputs.modulation, inputs.groups)
    assert len(compiled) == 4
