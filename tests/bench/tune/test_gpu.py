"""The GPU that is measured, by a scripted torch.cuda."""

import os
from types import SimpleNamespace

import pytest
import torch
from support.tuning import (
    CPU,
    PROBLEM,
    SMALL,
    choices,
    shaped,
)

from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.tune import cases as tune_cases
from resblock_bench.bench.tune import gpu as tune_gpu
from resblock_bench.bench.tune.cases import Case
from resblock_bench.bench.tune.gpu import DeviceLost
from resblock_bench.kernels import dispatch
from resblock_bench.kernels.tiers import Launch


class FakeCuda:
    """What GpuBench asks of torch.cuda. events: what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.ready_after = 3  # queries
        self.broken = False
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.queries = 0

            def record(self) -> None:
                fake.events.append("record")

            def query(self) -> bool:
                self.queries += 1
                return self.queries > fake.ready_after

            def synchronize(self) -> None:
                fake.events.append("wait")

            def elapsed_time(self, end: "Event") -> float:
                return 0.25

        def synchronize(device: torch.device) -> None:
            fake.events.append("synchronize")
            if fake.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        properties = SimpleNamespace(L2_cache_size=1000)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(dispatch, "_machine", lambda device: (SMALL, "sm_00"))
        monkeypatch.setattr(dispatch, "interpreting", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_the_gpu_is_the_current_one(cuda: FakeCuda) -> None:
    bench = tune_gpu.open_gpu()
    assert (bench.name, bench.arch, bench.machine) == ("a GPU", "sm_00", SMALL)
    assert bench.device == torch.device("cuda", 0)


def some_case() -> tuple[Case, Launch]:
    return tune_cases.draw_case("forward", PROBLEM, torch.float32, CPU, 0), shaped(choices()[0])


def test_results_are_there_once_the_device_is_done(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"y": torch.zeros(1)}
    monkeypatch.setattr(
        tune_gpu, "launched", lambda case, how: cuda.events.append("launch") or results
    )
    assert tune_gpu.GpuBench(CPU).run(*some_case()) is results
    assert cuda.events == ["launch", "record"]


def test_a_launch_that_never_ends_is_given_up(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_gpu, "launched", lambda case, how: {})
    cuda.ready_after = 10**9
    with pytest.raises(DeviceLost, match=r"did not end within 0\.1s"):
        tune_gpu.GpuBench(CPU, hang_s=0.05).run(*some_case())
    assert "synchronize" not in cuda.events  # which would never return


@pytest.mark.parametrize("call", ["run", "time_us"])
@pytest.mark.parametrize("broken", [False, True], ids=["refused", "broken"])
def test_a_refused_launch_is_told_from_a_broken_context(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, broken: bool, call: str
) -> None:
    def fail(case: Case, how: Launch) -> Tensors:
        cuda.broken = broken
        raise RuntimeError("Triton Error [CUDA]: something")

    monkeypatch.setattr(tune_gpu, "launched", fail)
    bench = tune_gpu.GpuBench(CPU)
    with pytest.raises(DeviceLost if broken else RuntimeError, match=r"Triton Error \[CUDA\]"):
        getattr(bench, call)(*some_case())


def test_a_time_is_the_median_with_a_long_flush_before_each(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def allocate(size: int, **options: object) -> SimpleNamespace:
        sizes.append((size, options["dtype"]))
        return SimpleNamespace(zero_=lambda: cuda.events.append("flush"))

    bench = tune_gpu.GpuBench(CPU)
    case, how = some_case()
    monkeypatch.setattr(tune_gpu, "launched", lambda case, how: cuda.events.append("launch"))
    monkeypatch.setattr(torch, "empty", allocate)
    assert bench.time_us(case, how) == 250.0
    assert bench.time_us(case, how) == 250.0
    assert sizes == [(16 * 1000, torch.uint8)] * 2  # freed between two series
    assert cuda.events[:6] == ["synchronize", "flush", "record", "launch", "record", "wait"]


def test_giving_up_waits_for_nothing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    tune_gpu.GpuBench(CPU).give_up(3)
    assert codes == [3] and cuda.events == []
