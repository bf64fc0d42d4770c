"""How a benchmark is run: checked, measured for memory, warmed up, timed, and what is noted of it.

    timer   perf_counter on a CPU; on CUDA device time, L2 flushed before each round
    round   one step, what it needs being made ready outside of the timed span
    rounds  as many as take --benchmark-max-time, ready-making included; --benchmark-min-rounds at
            least, MOST_ROUNDS at most

With each benchmark (`extra_info`): `bytes` is the least that the operation must move, `gb_per_s`
these bytes over the median, `floor_share` the share of the median that the machine's ceilings need
(bench/measure/floor.py), `peak_bytes` the most that is alive during a step, parameters and inputs
included, and `peak_above_baseline_bytes` without them. `predicted_us` is a prediction of the
operator's device time, null for blocks and for devices without figures (docs/prediction.md). The
step whose memory is measured for the operator's backward includes its forward.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from support.device_time import DeviceTime

from resblock_bench.bench.machine import environment
from resblock_bench.bench.machine.proc import usable_cpus
from resblock_bench.bench.measure.ceilings import measure_ceilings
from resblock_bench.bench.measure.devices import Device, default_kind, open_device
from resblock_bench.bench.measure.floor import impossible
from resblock_bench.bench.measure.workload import Workload
from resblock_bench.bench.records import Ceilings, Cell, Floor
from resblock_bench.kernels import dispatch

WARMUP_S = {"cpu": 0.05, "cuda": 0.3}
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Machine:
    """The device, its ceilings, and what every benchmark notes of it."""

    device: Device
    ceilings: Ceilings
    facts: dict[str, object]


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if hasattr(request.config, "workerinput"):
        # pytest-benchmark switches itself off there, and the run would pass without a number.
        pytest.fail("several workers would disturb each other: leave out -n")
    kind = default_kind()
    if kind == "cuda" and dispatch.interpreting():
        pytest.fail("the kernels would be interpreted: set TRITON_INTERPRET=0 (make benchmark)")
    threads = torch.get_num_threads()
    device = open_device(kind, min(threads, usable_cpus()))
    versions = environment.versions()
    facts = {
        "device": device.name,
        "torch": versions["torch"],
        "triton": versions["triton"],
        "threads": torch.get_num_threads(),
        "timer": device.timer.name,
        "l2": device.timer.l2,
    }
    yield Machine(device, measure_ceilings(device), facts)
    torch.set_num_threads(threads)


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, machine: Machine, request: pytest.FixtureRequest
) -> Iterator[Callable[..., None]]:
    """Runs one benchmark; fails where the result is wrong or the time too short to be true.

    cell      the block, or the one whose norm it is
    workload  its memory is measured
    check     raises where a result is wrong
    prepare   makes the arguments of one call of `run`
    run       what is timed
    floor     of the operation, by the ceilings and the median in ms
    predicted of the operation, by the device's name and the ceilings: microseconds, if anything
    """
    timer = request.node.get_closest_marker("benchmark").kwargs["timer"]

    def measure(
        *,
        group: str,
        cell: Cell,
        workload: Workload,
        check: Callable[[], None],
        prepare: Callable[[], tuple[Any, ...]],
        run: Callable[..., object],
        floor: Callable[[Ceilings, float], Floor],
        predicted: Callable[[str, Ceilings], float | None] = lambda device_name, ceilings: None,
    ) -> None:
        check()
        memory = machine.device.meter.measure(workload)
        benchmark.group = group
        rounds = 1
        if benchmark.enabled:
            options = request.config.option
            wall_s = _warm_up(prepare, run, timer, WARMUP_S[machine.device.kind])
            wanted = math.ceil(float(options.benchmark_max_time) / wall_s)
            rounds = max(options.benchmark_min_rounds, min(wanted, MOST_ROUNDS))
        benchmark.pedantic(run, setup=lambda: (prepare(), {}), rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        median_s, fastest_s = benchmark.stats["median"], benchmark.stats["min"]
        least = floor(machine.ceilings, median_s * 1e3)
        benchmark.extra_info.update(
            machine.facts,
            shape=[cell.batch, cell.channels, *(cell.resolution,) * cell.dims],
            dtype=cell.dtype,
            bytes=least.bytes,
            gb_per_s=least.bytes / median_s / 1e9,
            floor_share=least.share,
            peak_bytes=memory.peak_bytes,
            peak_above_baseline_bytes=memory.peak_above_baseline_bytes,
            predicted_us=predicted(machine.device.name, machine.ceilings),
        )
        reason = impossible(least, machine.ceilings, median_s * 1e3, fastest_s * 1e3)
        assert reason is None, reason

    yield measure
    if isinstance(timer, DeviceTime):
        timer.close()


def _warm_up(
    prepare: Callable[[], tuple[Any, ...]],
    run: Callable[..., object],
    timer: Callable[[], float],
    seconds: float,
) -> float:
    """Whole rounds, the two readings of the timer included; the wall time of one."""
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < seconds:
        arguments = prepare()
        timer()
        run(*arguments)
        timer()
        rounds += 1
    return (time.perf_counter() - started) / rounds
