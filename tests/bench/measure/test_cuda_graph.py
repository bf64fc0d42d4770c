"""The capture's order of calls, on a scripted torch.cuda; its results are tested on a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from resblock_bench.bench.measure.cuda_graph import WARMUP_STEPS, CaptureError, capture
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell


class Cuda:
    """What happened, in order, and on which stream."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.broken = False

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.happened.append("side waits"))

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.happened.append("main waits"))

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.happened.append("side")
        yield
        self.happened.append("main")

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.happened.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.happened.append("capture")
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError("capture ended in a broken state")
            self.happened.append("captured")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    scripted = Cuda()
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(scripted, name))
    return scripted


def workload(cuda: Cuda, step: Callable[[], object] = lambda: "out") -> SimpleNamespace:
    def noted() -> object:
        cuda.happened.append("step")
        return step()

    return SimpleNamespace(
        device=torch.device("cuda"),
        reset=lambda: cuda.happened.append("reset"),
        step=noted,
    )


def test_one_step_is_captured_after_a_warm_up_on_a_side_stream(cuda: Cuda) -> None:
    capture(workload(cuda))
    warm_up = ["reset", "step"] * WARMUP_STEPS
    assert cuda.happened == [
        *("side waits", "side", *warm_up, "main", "main waits"),
        *("reset", "capture", "step", "captured"),
    ]


def test_the_replay_runs_the_graph_and_not_the_step(cuda: Cuda) -> None:
    replay = capture(workload(cuda))
    cuda.happened.clear()
    assert replay() == "out"
    assert cuda.happened == ["replay"]


def failing_after(steps: int) -> Callable[[], object]:
    done = iter(range(steps))

    def step() -> object:
        if next(done, None) is None:
            raise ValueError("waits for the device\nand more")
        return None

    return step


@pytest.mark.parametrize("steps", [0, WARMUP_STEPS], ids=["warm-up", "capture"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_step_that_cannot_be_captured_says_why(cuda: Cuda, steps: int, broken: bool) -> None:
    """Its own reason, also where the end of the capture fails as a consequence."""
    cuda.broken = broken
    with pytest.raises(CaptureError, match=r"^ValueError: waits for the device$"):
        capture(workload(cuda, failing_after(steps)))
    assert cuda.happened[-1] == "reset"


def test_a_capture_that_cannot_be_ended_says_why(cuda: Cuda) -> None:
    cuda.broken = True
    with pytest.raises(CaptureError, match="RuntimeError: capture ended in a broken state"):
        capture(workload(cuda))


def test_an_interrupt_is_not_swallowed(cuda: Cuda) -> None:
    def interrupt() -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(workload(cuda, interrupt))


def test_there_are_no_cuda_graphs_on_a_cpu(make_cell: Callable[..., Cell]) -> None:
    cell, cpu = make_cell(), torch.device("cpu")
    real = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, cpu, 0), cpu)
    with pytest.raises(CaptureError, match="needs a GPU, and this step runs on cpu"):
        capture(real)
