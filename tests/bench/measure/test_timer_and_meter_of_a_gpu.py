"""The GPU's timer and memory meter, driven by a scripted torch.cuda: order of calls, not speed."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace

from resblock_bench.bench.measure.memory import CudaMeter
from resblock_bench.bench.measure.timing import DEFAULT_RULE, CudaTimer, time_fn
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell

CPU = torch.device("cpu")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order; every pair of events lies 1.5 ms apart."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 1.5

    def allocate(size: int, **options: object) -> SimpleNamespace:
        happened.append(f"allocate {size}")
        assert options["dtype"] == torch.uint8
        return SimpleNamespace(zero_=lambda: happened.append("flush"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=12345)
    )
    monkeypatch.setattr(torch, "empty", allocate)
    return happened


def test_the_cache_is_flushed_before_the_timed_span(events: list[str]) -> None:
    timer = CudaTimer(CPU)
    assert timer.sample_ms(lambda: events.append("step")) == 1.5
    assert events == ["allocate 12345", "flush", "record", "step", "record", "wait"]


def test_the_flush_buffer_lives_for_one_series(events: list[str]) -> None:
    timer = CudaTimer(CPU)
    rule = replace(DEFAULT_RULE, warmup_s=0, warmup_max_s=0, min_samples=6, max_samples=6)
    for _ in range(2):
        time_fn(lambda: None, timer, rule)
        assert timer._buffer is None
    assert events.count("allocate 12345") == 2
    assert events.count("flush") == 2 * (6 + rule.warmup_min_steps)


class Allocator:
    """A scripted torch.cuda: `live` bytes, to which each step adds the next of `of_steps`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workload: Workload) -> None:
        self.happened: list[str] = []
        self.live = 1000
        self.of_steps = [6000, 3000, 4000]
        self.peak = 0
        self.flush: weakref.WeakSet[object] = weakref.WeakSet()
        step = workload.step

        def counted() -> torch.Tensor:
            self.happened.append("step")
            self.peak = max(self.peak, self.allocated() + self.of_steps.pop(0))
            return step()

        monkeypatch.setattr(workload, "step", counted)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.happened.append("empty"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", self.read("peak"))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak + 500)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated())

    def allocated(self) -> int:
        return self.live + 12345 * len(self.flush)

    def reset(self, device: torch.device) -> None:
        self.happened.append("reset")
        self.peak = self.allocated()

    def read(self, word: str) -> Callable[[torch.device], int]:
        def call(device: torch.device) -> int:
            self.happened.append(word)
            return self.peak

        return call


@pytest.fixture
def workload(make_cell: Callable[..., Cell]) -> Workload:
    cell = make_cell()
    return Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU)


def test_each_peak_is_that_of_its_own_step(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Allocator(monkeypatch, workload)
    meter = CudaMeter(CPU, lambda: 123)
    results, cold = meter.first_results(workload)
    assert "out" in results
    memory = meter.measure(workload, cold)
    first = ["empty", "reset", "step", "peak"]
    assert gpu.happened == [*first, "step", *first]
    assert memory.method == "cuda_allocator"
    assert memory.cold_peak_bytes == 7000
    assert (memory.baseline_bytes, memory.peak_bytes) == (1000, 5000)
    assert memory.peak_above_baseline_bytes == 4000
    assert memory.reserved_peak_bytes == 5500
    assert memory.process_bytes == 123


def test_what_the_graph_holds_is_saved(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Allocator(monkeypatch, workload)
    call = workload.call

    def holding(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        gpu.live += 700
        return call(x, emb)

    gpu.of_steps = [0, 0]
    monkeypatch.setattr(workload, "step", lambda: None if gpu.of_steps.pop() else workload.x)
    monkeypatch.setattr(workload, "call", holding)
    workload.mode = "forward"
    assert CudaMeter(CPU).measure(workload).saved_for_backward_bytes == 700


def test_no_flush_buffer_is_counted(
    workload: Workload, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A series of samples holds one; what is measured after the series does not see it."""
    gpu = Allocator(monkeypatch, workload)

    class Buffer:
        def zero_(self) -> None:
            pass

    def allocate(size: int, **options: object) -> Buffer:
        buffer = Buffer()
        gpu.flush.add(buffer)
        return buffer

    alive: list[int] = []
    monkeypatch.setattr(torch, "empty", allocate)
    timer, rule = CudaTimer(CPU), replace(DEFAULT_RULE, warmup_s=0, min_samples=6, max_samples=6)
    time_fn(lambda: alive.append(len(gpu.flush)), timer, rule)
    assert set(alive) == {1}
    assert CudaMeter(CPU).measure(workload).baseline_bytes == 1000
    del timer  # alive until here, as a session's is
