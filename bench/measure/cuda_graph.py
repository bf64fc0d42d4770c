"""A step as a CUDA graph: what it takes once the host need not launch its kernels one by one."""

import gc
from collections.abc import Callable

import torch

from resblock_bench.bench.errors import first_line

from .workload import Workload

WARMUP_STEPS = 3


class CaptureError(RuntimeError):
    """A step that cannot be captured; the message says why."""


def capture(workload: Workload) -> Callable[[], object]:
    """Capture one step, with the backward pass in train mode, and return its replay.

    A replay runs on the current stream and returns the captured output, whose values it has
    overwritten; likewise the gradients, which `workload.leaves()` hold after the capture, made
    during it since they were None before. Dropout draws new masks in every replay.

    The graph keeps a private memory pool for as long as the replay, its output or a gradient
    lives: no memory can be measured then. Drop the replay and call `workload.reset()`.

    Raises CaptureError where there is no GPU or the step does what a capture forbids, such as
    waiting for the device; the gradients are None then. A capture that failed may leave the
    device's random generator unusable, so capture after everything else.
    """
    if workload.device.type != "cuda":
        raise CaptureError(f"a CUDA graph needs a GPU, and this step runs on {workload.device}")
    first: Exception | None = None
    try:
        _warm_up(workload)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            try:
                out = workload.step()
            except Exception as error:
                first = error  # the end of a broken capture raises an error of its own over it
                raise
    except Exception as error:
        workload.reset()
        reason = first or error
        raise CaptureError(first_line(reason)) from reason

    def replay() -> object:
        graph.replay()
        return out

    return replay


def _warm_up(workload: Workload) -> None:
    """On a side stream: libraries choose algorithms and allocate, and kernels are compiled.

    Nothing of it may live on, for autograd would wait for this stream in the captured backward.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_STEPS):
            workload.reset()
            workload.step()
    torch.cuda.current_stream().wait_stream(side)
    workload.reset()
    gc.collect()
