"""The bytes that one warm step needs, exact and repeatable.

    baseline    live just before the step: parameters, x, emb, cotangent
    peak        the most that is live at any moment of the step
    saved       what stays alive when only the graph is held: the block runs on a copy of x and emb,
                everything but out.grad_fn is dropped, and what was not there before is counted

`saved` is thus the bytes kept for the backward pass however they are kept: by autograd, by a
checkpoint's own hooks, or as attributes of a context, and counts the block's input where it is
kept. Parameters are not part of it. Without checkpointing it equals the sum over
`saved_tensors_hooks` of distinct storages that are not parameters.

Live bytes come from MemTracker (storages of live tensors; scratch memory inside an operator is not
seen) on a CPU and from the caching allocator (rounded up to its 512-byte blocks) on a GPU.
"""

import gc
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from resblock_bench.bench.records import Memory
from resblock_bench.bench.workload import Workload


class MemoryMeter(Protocol):
    """Measures a workload, or says why it cannot."""

    def unusable(self, impl: str) -> str | None: ...

    def measure(self, workload: Workload) -> Memory: ...


class TrackerMeter:
    """Live CPU tensors, real ones or, for a prediction, fake ones."""

    def __init__(self, method: Literal["mem_tracker", "fake_tensors"] = "mem_tracker") -> None:
        self._method: Literal["mem_tracker", "fake_tensors"] = method

    def unusable(self, impl: str) -> str | None:
        if impl == "compiled":
            return "MemTracker makes torch.compile step aside, so compiled code is not measurable"
        return None

    def measure(self, workload: Workload) -> Memory:
        with _tracking(workload) as tracker:
            baseline = _live_bytes(tracker)
            workload.step()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        workload.reset()
        with _tracking(workload) as tracker:
            saved = _graph_bytes(workload, lambda: _live_bytes(tracker))
        workload.reset()
        return _memory(self._method, baseline, peak, saved)


def _tracking(workload: Workload) -> MemTracker:
    """A tracker that knows the workload's resident tensors; a tracker serves one step only."""
    workload.reset()
    gc.collect()
    tracker = MemTracker()
    tracker.track_external(*_resident(workload))
    return tracker


def _resident(workload: Workload) -> list[Tensor]:
    state = [*workload.block.parameters(), *workload.block.buffers()]
    return [*state, workload.x, workload.emb, workload.cotangent]


def _live_bytes(tracker: MemTracker) -> int:
    return int(tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"])


class CudaMeter:
    """The caching allocator's allocated bytes; no flush buffer may be alive."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def unusable(self, impl: str) -> str | None:
        return None

    def measure(self, workload: Workload) -> Memory:
        workload.results()  # warm: libraries have allocated their workspaces
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        baseline = self._live_bytes()
        workload.step()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        workload.reset()
        saved = _graph_bytes(workload, self._live_bytes)
        workload.reset()
        return _memory("cuda_allocator", baseline, peak, saved)

    def _live_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)


def _graph_bytes(workload: Workload, live_bytes: Callable[[], int]) -> int:
    if workload.mode == "inference":
        return 0
    before = live_bytes()
    # Copies, so that they die with the last reference unless the graph keeps them.
    x, emb = workload.x.clone(), workload.emb.clone()
    out = workload.call(x, emb)
    graph = out.grad_fn
    del x, emb, out
    gc.collect()
    held = live_bytes() - before
    del graph
    return held


def _memory(
    method: Literal["mem_tracker", "cuda_allocator", "fake_tensors"],
    baseline: int,
    peak: int,
    saved: int,
) -> Memory:
    return Memory(
        method=method,
        baseline_bytes=baseline,
        peak_bytes=peak,
        peak_above_baseline_bytes=peak - baseline,
        saved_for_backward_bytes=saved,
        cold_peak_bytes=None,
        reserved_peak_bytes=None,
        process_bytes=None,
    )
