"""The bytes that a step needs: of a warm step, exact and repeatable, and of the first.

    baseline    live just before the step: parameters, x, emb, cotangent
    peak        the most that is live at any moment of a warm step
    saved       what stays alive when only the graph is held: the block runs on a copy of x and emb,
                everything but out.grad_fn is dropped, and what was not there before is counted
    cold peak   the most that is live during the first step of the process, in which libraries
                allocate their workspaces and try algorithms
    reserved    the most that the caching allocator held during the warm step, its cache and what
                it loses to fragmentation included
    process     what the system charges the process with, its libraries included. On a GPU NVML's
                figure after the warm step; on a CPU the peak resident set since the process began,
                so the correctness check is part of it. It does not repeat exactly.

`saved` is thus the bytes kept for the backward pass however they are kept: by autograd, by a
checkpoint's own hooks, or as attributes of a context, and counts the block's input where it is
kept. Parameters are not part of it. Without checkpointing it equals the sum over
`saved_tensors_hooks` of distinct storages that are not parameters.

Live bytes come on a CPU from MemTracker, of whole models from LiveBytes (storages of live tensors;
scratch memory inside an operator is not seen), on a GPU from the caching allocator (rounded up to
its 512-byte blocks). On a CPU the cold peak differs from the warm one only where an implementation
keeps tensors from its first step.

The first step is the cell's own. It serves the correctness check at once, but for a cell with
dropout, whose check runs without: its masks would be missing from the cold peak, so such a cell
makes one step of its own before the check.
"""

import gc
import resource
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from resblock_bench.bench.records import Memory

from .implementations import compiles
from .storages import StorageWatch
from .workload import Workload

if TYPE_CHECKING:
    # 70 MB that the process which waits for the cells does not need.
    from torch.distributed._tools.mem_tracker import MemTracker


Method = Literal["mem_tracker", "live_storages", "fake_tensors"]


class MemoryMeter(Protocol):
    """Measures a workload, or says why it cannot.

    `first_results` makes the first step of the process: its results, and its peak in bytes, which
    is handed to `measure` as `cold_peak_bytes`. The results must be let go of before `measure`:
    an allocator cannot tell them from the step's own tensors.
    """

    def unusable(self, impl: str) -> str | None: ...

    def first_results(self, workload: Workload) -> tuple[dict[str, Tensor], int]: ...

    def measure(self, workload: Workload, cold_peak_bytes: int | None = None) -> Memory: ...


class TrackerMeter:
    """Live CPU tensors, real ones or, for a prediction, fake ones."""

    def __init__(self, method: Method = "mem_tracker") -> None:
        self._method = method

    def unusable(self, impl: str) -> str | None:
        if compiles(impl):
            return "MemTracker makes torch.compile step aside, so compiled code is not measurable"
        return None

    def first_results(self, workload: Workload) -> tuple[dict[str, Tensor], int]:
        with tracking(workload) as tracker:
            results = workload.results()
        return results, _peak_bytes(tracker)

    def _method_of(self, workload: Workload) -> Method:
        whole = workload.cell.workload != "block" and self._method == "mem_tracker"
        return "live_storages" if whole else self._method

    def measure(self, workload: Workload, cold_peak_bytes: int | None = None) -> Memory:
        workload.freshen()
        with tracking(workload) as tracker:
            baseline = _live_bytes(tracker)
            workload.step()
        peak = _peak_bytes(tracker)
        with tracking(workload) as tracker:
            saved = _graph_bytes(workload, lambda: _live_bytes(tracker))
        return Memory(
            method=self._method_of(workload),
            baseline_bytes=baseline,
            peak_bytes=peak,
            peak_above_baseline_bytes=peak - baseline,
            saved_for_backward_bytes=saved,
            cold_peak_bytes=cold_peak_bytes,
            reserved_peak_bytes=None,
            process_bytes=peak_resident_bytes() if self._method == "mem_tracker" else None,
        )


def peak_resident_bytes() -> int:
    """The most main memory that this process has held since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tracking(workload: Workload) -> "MemTracker | LiveBytes":
    """A tracker that knows the workload's resident tensors; a tracker serves one step only."""
    from torch.distributed._tools.mem_tracker import MemTracker

    workload.reset()
    gc.collect()
    if workload.cell.workload != "block":
        return LiveBytes(workload.resident())
    tracker = MemTracker()
    tracker.track_external(*workload.resident())
    return tracker


def _live_bytes(tracker: "MemTracker | LiveBytes") -> int:
    if isinstance(tracker, LiveBytes):
        return tracker.live
    return int(tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"])


def _peak_bytes(tracker: "MemTracker | LiveBytes") -> int:
    if isinstance(tracker, LiveBytes):
        return tracker.peak
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


class LiveBytes(StorageWatch):  # type: ignore[no-untyped-call]
    """The bytes of all storages that are alive, those of `tensors` among them.

    MemTracker's count, which asks every storage after every operator: too slow for a model.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        for tensor in tensors:
            self.see(tensor)

    def born(self, number: int, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def died(self, number: int, size: int) -> None:
        self.live -= size


class CudaMeter:
    """The caching allocator's bytes; no flush buffer may be alive.

    `process_bytes` reads what the driver charges this process with.
    """

    def __init__(
        self, device: torch.device, process_bytes: Callable[[], int | None] = lambda: None
    ) -> None:
        self._device = device
        self._process_bytes = process_bytes

    def unusable(self, impl: str) -> str | None:
        return None

    def first_results(self, workload: Workload) -> tuple[dict[str, Tensor], int]:
        self._reset_peaks()
        results = workload.results()
        torch.cuda.synchronize(self._device)
        return results, torch.cuda.max_memory_allocated(self._device)

    def measure(self, workload: Workload, cold_peak_bytes: int | None = None) -> Memory:
        workload.results()  # warm: libraries have allocated their workspaces
        workload.freshen()
        self._reset_peaks()
        baseline = self._live_bytes()
        workload.step()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        charged = self._process_bytes()  # while the allocator still holds what the step needed
        workload.reset()
        saved = _graph_bytes(workload, self._live_bytes)
        return Memory(
            method="cuda_allocator",
            baseline_bytes=baseline,
            peak_bytes=peak,
            peak_above_baseline_bytes=peak - baseline,
            saved_for_backward_bytes=saved,
            cold_peak_bytes=cold_peak_bytes,
            reserved_peak_bytes=reserved,
            process_bytes=charged,
        )

    def _reset_peaks(self) -> None:
        """Start the statistics of a step on an empty cache.

        A cached block that is a little too large is handed out, and counted, whole; and what
        earlier steps left in the cache would count as reserved by this one.
        """
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def _live_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)


def _graph_bytes(workload: Workload, live_bytes: Callable[[], int]) -> int:
    """What a graph keeps alive."""
    if workload.mode == "inference":
        return 0
    before = live_bytes()
    graph = workload.graph()
    gc.collect()
    held = live_bytes() - before
    del graph
    return held
