"""Times a step: warm-up by time, then single samples until the median is known well enough.

A measurement is a value; nothing is printed. What one sample covers is the timer's business:

    CpuTimer    wall clock around the step
    CudaTimer   device time between two events around the step, the L2 cache flushed before it
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from resblock_bench.bench import stats
from resblock_bench.bench.records import StopRule

Step = Callable[[], object]


class Timer(Protocol):
    """Times one call. `name` and `l2` stand in the contract; `close` frees what it holds."""

    name: str
    l2: str

    def sample_ms(self, step: Step) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Rule:
    """When to stop: warm-up, wanted precision of the median, and the limits."""

    warmup_s: float = 0.1
    warmup_max_s: float = 1.0
    warmup_min_steps: int = 2
    steady: float = 0.02
    burst_s: float = 0.1
    gap_s: float = 0.01
    confidence: float = 0.95
    rel_half_width: float = 0.02
    min_samples: int = 8
    max_samples: int = 1000
    max_time_s: float = 1.0


@dataclass(frozen=True)
class Timing:
    """The raw samples of one cell in order, which rule ended them, and the warm-up before."""

    samples_ms: list[float]
    stop_rule: StopRule
    warmup_steps: int
    warmup_s: float
    warmup_steady: bool
    bursts: list[int]


def time_fn(
    step: Step,
    timer: Timer,
    rule: Rule,
    *,
    prepare: Callable[[], object] = lambda: None,
    warm: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> Timing:
    """Sample `step` until the rule stops it.

    step      what is timed; what it returns is freed after the sample
    prepare   called before every step, outside the timed span
    warm      called once, between the warm-up and the first sample
    clock     seconds, for the warm-up and the time limit only

    The time limit covers sampling with its preparations, not the warm-up; at least
    `rule.min_samples` are taken whatever it says.
    """

    def sample_ms() -> float:
        prepare()
        return timer.sample_ms(step)

    try:
        started = clock()
        warmup_steps = 0
        while warmup_steps < rule.warmup_min_steps or clock() - started < rule.warmup_s:
            sample_ms()
            warmup_steps += 1
        warmup_s = clock() - started
        warm()

        samples: list[float] = []
        stop: StopRule | None = None
        started = clock()
        while stop is None:
            samples.append(sample_ms())
            stop = _stop(samples, clock() - started, rule)
        return Timing(samples, stop, warmup_steps, warmup_s, True, [len(samples)])
    finally:
        timer.close()


def _stop(samples: list[float], elapsed_s: float, rule: Rule) -> StopRule | None:
    if len(samples) < rule.min_samples:
        return None
    if stats.relative_half_width(samples, rule.confidence) <= rule.rel_half_width:
        return "precision"
    if len(samples) >= rule.max_samples:
        return "samples"
    return "time" if elapsed_s >= rule.max_time_s else None


class CpuTimer:
    """Wall clock. Caches are in whatever state the previous step left them."""

    name = "perf_counter"
    l2 = "not flushed"

    def sample_ms(self, step: Step) -> float:
        start = time.perf_counter_ns()
        result = step()  # held, so that the graph is freed after the clock was read
        end = time.perf_counter_ns()
        del result
        return (end - start) / 1e6

    def close(self) -> None:
        pass


class CudaTimer:
    """CUDA events on the current stream; the cache is flushed before the first event.

    The flush writes a buffer of exactly the L2 size, so it also keeps the device busy while the
    step's first kernels are queued. It lives only during a series of samples: `close` frees it, so
    that no memory measurement sees it.
    """

    name = "cuda_events"
    l2 = "flushed"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: torch.Tensor | None = None

    def sample_ms(self, step: Step) -> float:
        if self._buffer is None:
            size = torch.cuda.get_device_properties(self._device).L2_cache_size
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        self._buffer.zero_()
        start.record()
        result = step()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end))

    def close(self) -> None:
        self._buffer = None
