"""The benchmarks under pytest-benchmark, and their timer on a scripted GPU."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest_benchmark import plugin
from pytest_benchmark.fixture import BenchmarkFixture
from support import device_time
from support.device_time import DeviceTime, UnknownVersionError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLUSH_MS, PREPARE_MS = 7.0, 3.0


class Gpu:
    """A device with a clock of its own, on which everything happens at once as it is queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0.0
        self.happened: list[str] = []
        self.buffers = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.happened.append("record")
                self.at_ms = gpu.now_ms

            def elapsed_time(self, end: "Event") -> float:
                assert gpu.happened[-1] == "wait"
                return end.at_ms - self.at_ms

        def allocate(size: int, **options: object) -> "Buffer":
            assert size == 12345 and options == {"dtype": torch.uint8, "device": "cuda"}
            return Buffer()

        class Buffer:
            def __init__(self) -> None:
                gpu.buffers += 1

            def __del__(self) -> None:
                gpu.buffers -= 1

            def zero_(self) -> None:
                gpu.run("flush", FLUSH_MS)

        properties = SimpleNamespace(L2_cache_size=12345)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.happened.append("wait"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch, "empty", allocate)

    def run(self, name: str, ms: float) -> None:
        self.happened.append(name)
        self.now_ms += ms


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def make_benchmark(request: pytest.FixtureRequest, timer: DeviceTime) -> BenchmarkFixture:
    """The fixture as its plugin makes it, but enabled also where the tests run in parallel."""
    return BenchmarkFixture(
        request.node,
        add_stats=lambda stats: None,
        logger=SimpleNamespace(debug=lambda *arguments, **options: None),
        warner=None,
        disabled=False,
        **dict(request.config._benchmarksession.options, timer=plugin.NameWrapper(timer)),
    )


def test_device_time_is_that_between_the_flush_and_the_end(gpu: Gpu) -> None:
    timer = DeviceTime()
    first = timer()
    gpu.run("step", 1.5)
    assert timer() - first == pytest.approx(1.5e-3, rel=1e-12)
    span = ["flush", "record", "step", "record", "wait", "flush", "record"]
    assert gpu.happened == span


def test_rounds_hold_device_time_alone(gpu: Gpu, request: pytest.FixtureRequest) -> None:
    steps_ms = [2.0, 0.25, 16.0, 1.5]
    queue = iter(steps_ms)
    benchmark = make_benchmark(request, DeviceTime())
    benchmark.pedantic(
        lambda: gpu.run("step", next(queue)),
        setup=lambda: gpu.run("prepare", PREPARE_MS),
        rounds=len(steps_ms),
    )
    assert benchmark.stats.stats.data == pytest.approx([ms / 1e3 for ms in steps_ms], rel=1e-9)
    assert gpu.happened[gpu.happened.index("prepare") :][:7] == [
        "prepare", "flush", "record", "step", "record", "wait", "flush"
    ]  # fmt: skip
    assert benchmark.stats.as_dict()["options"]["timer"] == "device_time"


def test_calibration_counts_in_device_time(gpu: Gpu, request: pytest.FixtureRequest) -> None:
    """Two readings of an idle device lie 1 µs apart; a round is to take ten times that."""
    timer = DeviceTime()
    record = torch.cuda.Event.record

    def slow_record(event: object) -> None:
        gpu.now_ms += 1e-3
        record(event)

    torch.cuda.Event.record = slow_record
    benchmark = make_benchmark(request, timer)
    benchmark._max_time = 1e-3
    benchmark(lambda: gpu.run("step", 2e-3))
    # A round of n steps takes 2n + 1 µs: 1 is too few even to estimate from, and 10 are enough.
    assert benchmark.stats.iterations == 10
    assert benchmark.stats.stats.data == pytest.approx([2.1e-6] * 48, rel=1e-6)


def test_the_flush_buffer_is_freed_and_time_goes_on(gpu: Gpu) -> None:
    timer = DeviceTime()
    timer()
    gpu.run("step", 1.0)
    before = timer()
    assert gpu.buffers == 1
    timer.close()
    assert gpu.buffers == 0
    gpu.run("a memory measurement", 100.0)
    assert timer() == before == 1e-3


@pytest.mark.parametrize("found", ["4.0.0", "5.4.0", "6.0", "10.1", "unknown"])
def test_an_unknown_pytest_benchmark_is_refused(
    found: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_time, "version", lambda package: found)
    with pytest.raises(UnknownVersionError, match=rf">=5\.0,<5\.4, and {found}"):
        DeviceTime()()


@pytest.mark.parametrize("found", ["5.0.0", "5.3.1"])
def test_a_known_pytest_benchmark_is_taken(
    found: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_time, "version", lambda package: found)
    assert DeviceTime()() == 0.0


CASE = "tests/benchmarks/test_kernels.py::test_group_norm_silu[384x16x16-b1-fp32-forward-fused]"


def run_case(*options: str) -> subprocess.CompletedProcess[str]:
    """The smallest benchmark, in a process that is nobody's worker, with the plugin it needs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "-m", "benchmark"]
    return subprocess.run(
        [*command, CASE, "--benchmark-max-time=0.001", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes are those of a CPU")
def test_a_run_is_noted_and_compared(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    now, earlier = tmp_path / "now.json", tmp_path / "earlier.json"
    compare = [
        f"--benchmark-storage={tmp_path}",
        f"--benchmark-compare={earlier}",
        "--benchmark-compare-fail=median:5%",
    ]
    names = ("min", "max", "mean", "stddev", "median", "iqr", "ops", "rounds", "iterations")
    fast = {"fullname": CASE, "stats": {**dict.fromkeys(names, 1e-9), "outliers": "0;0"}}
    here = request.config._benchmarksession.get_machine_info()
    earlier.write_text(json.dumps({"machine_info": here, "benchmarks": [fast]}))

    done = run_case(f"--benchmark-json={now}", *compare)
    assert done.returncode != 0
    assert "(NOW)" in done.stdout, done.stdout + done.stderr  # it was compared
    assert "Performance has regressed" in done.stderr
    report = json.loads(now.read_text())
    (result,) = report["benchmarks"]
    info, median_s = result["extra_info"], result["stats"]["median"]
    # x, y; scale and shift; weight and bias: all in fp32.
    assert info["bytes"] == 4 * (2 * 384 * 16 * 16 + 2 * 384 + 2 * 384)
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / median_s / 1e9)
    assert info["floor_share"] > 0
    assert info["peak_bytes"] > info["peak_above_baseline_bytes"] >= 4 * 384 * 16 * 16
    assert (info["timer"], info["l2"]) == ("perf_counter", "not flushed")
    assert (info["shape"], info["dtype"]) == ([1, 384, 16, 16], "fp32")
    assert (info["torch"], info["threads"]) == (str(torch.__version__), 1)
    assert {"device", "triton"} <= info.keys()
    assert result["stats"]["rounds"] >= 5 and result["options"]["timer"] == "perf_counter"


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"cpu": {"count": 2}, "gpu": "one"}, None),
        ({"cpu": {"count": 2}, "gpu": "two"}, "gpu 'two', here 'one'"),
        ({"cpu": {"count": 4}, "gpu": "one"}, r"cpu\.count 4, here 2"),
        ({"cpu": {"count": 2}}, "gpu None, here 'one'"),
    ],
)
def test_times_of_another_machine_are_refused(
    theirs: dict[str, object], named: str | None, request: pytest.FixtureRequest
) -> None:
    refusal = pytest.raises(pytest.UsageError, match=named) if named else nullcontext()
    with refusal:
        request.config.hook.pytest_benchmark_compare_machine_info(
            config=request.config,
            benchmarksession=request.config._benchmarksession,
            machine_info={"cpu": {"count": 2}, "gpu": "one"},
            compared_benchmark={"machine_info": theirs},
        )
