"""Twelve faults of other suites that their users report, and that this one must not have."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pynvml
import pytest
from support.fake_nvml import FakeGpu, FakeNvml
from torch import Tensor, nn

from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine import nvml
from resblock_bench.bench.machine.visible_gpus import visible_gpus
from resblock_bench.bench.measure.cell import Task, contract_of, id_of
from resblock_bench.bench.measure.floor import judged
from resblock_bench.bench.measure.stats import median_interval
from resblock_bench.bench.measure.telemetry import open_probe
from resblock_bench.bench.records import Ceilings, Environment, Ratio, Row
from resblock_bench.bench.runs.export import export
from resblock_bench.bench.runs.folder import Run, read_run
from resblock_bench.bench.runs.table import summary

pytestmark = pytest.mark.slow

TINY = ("-a", "channels=32", "-a", "resolution=4", "-a", "batch=1", "-a", "mode=inference")
QUICK = ("--samples", "6", "--threads", "1", "--no-plots")


def test_1_identical_code_is_not_flagged() -> None:
    """Samples drift within a run, which an interval for independent samples does not know."""
    generator = random.Random(1)

    def timed() -> list[float]:
        level, samples = 0.0, []
        for _ in range(150):
            level = 0.8 * level + generator.gauss(0, 0.05)
            samples.append(10.0 * 2.718 ** (level + generator.gauss(0, 0.02)))
        return samples

    disjoint = 0
    for _ in range(200):
        first, second = (median_interval(timed(), 0.95) for _ in range(2))
        assert first is not None
        assert second is not None
        disjoint += first[1] < second[0] or second[1] < first[0]
    assert disjoint <= 10


def test_2_nothing_measured_is_no_success(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli(
        "run", *TINY, *QUICK, "-a", "dims=1", "-a", "layout=nhwc", "--output", tmp_path / "run"
    )
    assert done.code == 3
    assert "2 skipped" in done.out


def test_2_a_nan_is_no_success(
    measure: Callable[..., Row], add_implementation: Callable[..., None]
) -> None:
    def poison(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = module(x, emb)
        return out * float("nan")

    add_implementation("poisoned", poison)
    row = measure(impl="poisoned")
    assert (row.status, row.samples_ms, row.median_ms) == ("wrong", None, None)


def test_3_a_crash_poisons_nothing_that_follows(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli(
        "run", *TINY, *QUICK, "-a", "impl=segfaulting,reference", "--output", tmp_path / "run"
    )
    assert done.code == 3
    crashed, good = read_run(tmp_path / "run").rows
    assert (crashed.status, good.status) == ("crashed", "ok")
    run_cli("run", *TINY, *QUICK, "-a", "impl=reference", "--output", tmp_path / "alone")
    (alone,) = read_run(tmp_path / "alone").rows
    assert good.correctness == alone.correctness
    assert exact_bytes(good) == exact_bytes(alone)


def exact_bytes(row: Row) -> tuple[int | None, ...]:
    """What of a row's memory repeats to the byte."""
    memory = row.memory
    assert memory is not None
    return (
        memory.baseline_bytes,
        memory.peak_bytes,
        memory.saved_for_backward_bytes,
        memory.cold_peak_bytes,
    )


def test_4_out_of_memory_is_neither_zero_nor_success(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_cli(
        "run", *TINY, *QUICK, "-a", "impl=greedy,reference", "--memory-limit", "1GiB",
        "--format", "csv", "--output", folder,
    )  # fmt: skip
    row = read_run(folder).rows[0]
    assert row.status == "oom"
    numbers = (row.median_ms, row.throughput_images_per_s, row.memory, row.samples_ms)
    assert numbers == (None,) * 4
    with (folder / "cells.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["status"], first["median_ms"], first["memory.peak_bytes"]) == ("oom", "", "")


def test_5_throttling_is_seen_and_told(run_cli: Callable, tmp_path: Path) -> None:
    arguments = (*TINY, *QUICK, "-a", "impl=overheated", "--output", tmp_path / "run")
    done = run_cli("run", *arguments)
    assert done.code == 0
    (row,) = read_run(tmp_path / "run").rows
    assert row.status == "ok"
    assert row.conditions is not None
    assert row.conditions.throttled_us == {"thermal slowdown": 500_000}
    assert len(row.conditions.disturbances) == 1
    assert "! 1 of 1 cells were disturbed" in done.out
    assert "thermal" in done.out


def test_6_rows_of_another_machine_are_not_mixed(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_cli("run", *TINY, *QUICK, "--output", folder)
    path = folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "a faster one"}))
    done = run_cli("run", "--resume", "--output", folder)
    assert done.code == 2
    assert "cpu was a faster one" in done.err


def test_7_peak_memory_is_the_cell_s_own(run_cli: Callable, tmp_path: Path) -> None:
    """Not that of a larger cell before it, nor different the second and third time."""
    found = []
    for number, batches in enumerate(("4,1", "1,2", "1")):
        folder = tmp_path / str(number)
        selection = [*TINY[:4], "-a", "mode=train", "-a", "impl=fused", "-a", f"batch={batches}"]
        assert run_cli("run", *selection, *QUICK, "--output", folder).code == 0
        (row,) = (row for row in read_run(folder).rows if row.axes.batch == 1)
        found.append(exact_bytes(row))
    assert len(set(found)) == 1


def test_8_one_timer_stands_under_a_number_and_is_named(make_task: Callable[..., Task]) -> None:
    task = make_task()
    contract = contract_of(task)
    assert (contract.timer, contract.l2) == ("perf_counter", "not flushed")
    other = msgspec.structs.replace(task, device="cuda")
    assert contract_of(other).timer == "cuda_events"
    assert contract_of(other).l2 == "flushed"
    assert id_of(task) != id_of(other)


def test_9_fast_but_wrong_is_not_timed(
    measure: Callable[..., Row], add_implementation: Callable[..., None]
) -> None:
    def lazy(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        return x * 1.0

    add_implementation("lazy", lazy)
    row = measure(impl="lazy", mode="inference")
    assert (row.status, row.samples_ms) == ("wrong", None)


@pytest.mark.parametrize(("bytes_per_s", "status"), [(1.0, "impossible"), (1e18, "ok")])
def test_9_faster_than_memory_can_be_is_impossible(
    measure: Callable[..., Row], found: Environment, bytes_per_s: float, status: str
) -> None:
    ceilings = Ceilings(
        copy_bytes_per_s=bytes_per_s,
        peak_bytes_per_s=bytes_per_s,
        matrix_flops_per_s=dict.fromkeys(("fp32", "bf16", "fp16"), 1e12),
    )
    row = measure(environment=msgspec.structs.replace(found, ceilings=ceilings))
    row = judged(row, ceilings)
    assert row.status == status
    assert row.floor is not None
    assert row.floor.share == pytest.approx(
        max(row.floor.bytes_ms, row.floor.flops_ms) / row.median_ms
    )
    # The samples are kept as evidence.
    assert len(row.samples_ms or []) == 6


def test_10_an_average_shows_its_range_and_its_holes(some_row: Callable[[str], Row]) -> None:
    base = some_row("inference")

    def row(ratio: float | None, **axes: object) -> Row:
        cell = msgspec.structs.replace(base.axes, **axes)
        if ratio is None:
            return msgspec.structs.replace(base, axes=cell, status="crashed")
        known = Ratio(value=ratio, low=None, high=None)
        return msgspec.structs.replace(base, axes=cell, ratio=known)

    rows = [
        row(1.0), row(2.0, impl="fused"),
        row(1.0, batch=3), row(0.5, impl="fused", batch=3),
        row(1.0, batch=4), row(None, impl="fused", batch=4),
    ]  # fmt: skip
    assert "(0.50–2.00 over 2 of 3 cells)" in summary(rows)
    assert "1 crashed" in summary(rows)


def test_11_no_digit_is_lost(
    some_row: Callable[[str], Row], plan: Plan, found: Environment, tmp_path: Path
) -> None:
    row = some_row("inference")
    export(Run(tmp_path, plan, found, [row]), ["csv"])
    with (tmp_path / "cells.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["median_ms"]) == row.median_ms
    assert json.loads(line["samples_ms"]) == row.samples_ms
    assert msgspec.json.decode(msgspec.json.encode(row), type=Row) == row


def test_12_the_visible_gpu_is_watched_and_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = ({pynvml.NVML_CLOCK_SM: mhz, pynvml.NVML_CLOCK_MEM: 2600} for mhz in (300, 1980))
    gpus = [
        FakeGpu(uuid, nvmlDeviceGetClockInfo=clock)
        for uuid, clock in zip(("GPU-aaaa-1", "GPU-bbbb-2"), clocks, strict=True)
    ]
    monkeypatch.setattr(nvml, "pynvml", FakeNvml(*gpus))
    (gpu,) = visible_gpus({"CUDA_VISIBLE_DEVICES": "1"})
    probe = open_probe("cuda", gpu.uuid)
    try:
        assert probe.read().sm_clock_mhz == 1980
    finally:
        probe.close()
