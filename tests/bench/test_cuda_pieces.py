"""The GPU's timer and memory meter, driven by a scripted torch.cuda: order of calls, not speed."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from resblock_bench.bench.memory import CudaMeter
from resblock_bench.bench.records import Cell
from resblock_bench.bench.timing import CudaTimer, Rule, time_fn
from resblock_bench.bench.workload import Workload, draw_inputs, draw_weights

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
    rule = Rule(warmup_s=0, warmup_max_s=0, min_samples=6, max_samples=6)
    for _ in range(2):
        time_fn(lambda: None, timer, rule)
        assert timer._buffer is None
    assert events.count("allocate 12345") == 2
    assert events.count("flush") == 2 * (6 + rule.warmup_min_steps)


def test_the_peak_is_that_of_a_warm_step_above_its_baseline(
    make_cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cell()
    workload = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU)
    happened: list[str] = []
    step = workload.step

    def counted() -> torch.Tensor:
        happened.append("step")
        return step()

    def said(word: str, value: int = 0) -> Callable[..., int]:
        def call(device: torch.device) -> int:
            happened.append(word)
            return value

        return call

    live = iter([1000, 1000, 1700])
    monkeypatch.setattr(workload, "step", counted)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", said("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", said("peak", 5000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(live))
    memory = CudaMeter(CPU).measure(workload)
    assert happened == ["step", "reset", "step", "peak"]
    assert memory.method == "cuda_allocator"
    assert (memory.baseline_bytes, memory.peak_bytes) == (1000, 5000)
    assert memory.peak_above_baseline_bytes == 4000
    assert memory.saved_for_backward_bytes == 700
