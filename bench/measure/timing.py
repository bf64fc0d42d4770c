"""Times a step: warm-up until the speed is steady, then bursts of samples.

A measurement is a value; nothing is printed. What one sample covers is the timer's business:

    CpuTimer    wall clock around the step
    CudaTimer   device time between two events around the step, the L2 cache flushed before it

Samples come in short bursts with gaps between them, since one long loop heats a device until it
slows down, and since samples spread over time see more of what the machine does. Whether the median
is known well enough is asked at the end of a burst only, and not before BURSTS of them: an interval
that is looked at after every sample is narrow by luck sooner or later.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from time import perf_counter_ns  # as it is before an implementation may replace it
from typing import Protocol

import torch
from msgspec import Struct
from msgspec.structs import asdict

from resblock_bench.bench.records import Rule, StopRule

from . import stats

Step = Callable[[], object]
BURSTS = 8
"""The fewest bursts after which the precision may end a series."""


class ClockError(RuntimeError):
    """A sample that no step can have taken."""


class Timer(Protocol):
    """Times one call. `name` and `l2` stand in the contract; `close` frees what it holds."""

    name: str
    l2: str

    def sample_ms(self, step: Step) -> float: ...

    def close(self) -> None: ...


DEFAULT_RULE = Rule(
    warmup_s=0.1,
    warmup_max_s=1.0,
    warmup_min_steps=2,
    steady=0.02,
    burst_s=0.03,
    gap_s=0.05,
    confidence=0.95,
    rel_half_width=0.025,
    min_samples=8,
    max_samples=4000,
    max_time_s=3.5,
)


class WarmUp(Struct, frozen=True, kw_only=True):
    """What came before the samples; `warmup_steady`: it ended because the speed was steady."""

    warmup_steps: int
    warmup_s: float
    warmup_steady: bool


class Timing(WarmUp, frozen=True, kw_only=True):
    """The raw samples of one cell in order, how many each burst has, and which rule ended them."""

    samples_ms: list[float]
    bursts: list[int]
    stop_rule: StopRule


class Sampler:
    """Takes samples of a step: makes it ready, times it, and checks the clock.

    step      what is timed; what it returns is freed after the sample
    prepare   called before every step, outside the timed span
    clock     monotonic seconds, for everything but the samples

    Raises ClockError for a sample that is not above zero.
    """

    def __init__(
        self,
        step: Step,
        timer: Timer,
        *,
        prepare: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step, self._timer, self._prepare = step, timer, prepare
        self.clock = clock

    def sample_ms(self) -> float:
        """One sample."""
        self._prepare()
        sample = self._timer.sample_ms(self._step)
        if not sample > 0:
            raise ClockError(
                f"the timer {self._timer.name} says that a step took {sample} ms: its clock went "
                "backwards or is too coarse for this step, so no time can be trusted"
            )
        return sample

    def burst(self, seconds: float, least: int = 1) -> Iterator[float]:
        """Samples for so many seconds, but at least so many samples."""
        opened = self.clock()
        for count in itertools.count(1):
            yield self.sample_ms()
            if count >= least and self.clock() - opened >= seconds:
                return

    def warm_up(self, rule: Rule, clock_mhz: Callable[[], float | None] | None = None) -> WarmUp:
        """Take samples until the speed is steady, as the rule has it.

        clock_mhz   the device's clock, or None where it cannot be read; it has to be steady, too
        """
        steps, steady = 0, False
        window: list[float] = []
        medians: list[float] = []
        clocks: list[float] = []
        started = opened = self.clock()
        while True:
            elapsed = self.clock() - started
            least = steps >= rule.warmup_min_steps and elapsed >= rule.warmup_s
            if least and (steady or elapsed >= rule.warmup_max_s):
                return WarmUp(warmup_steps=steps, warmup_s=elapsed, warmup_steady=steady)
            window.append(self.sample_ms())
            steps += 1
            now = self.clock()
            if now - opened >= rule.warmup_s / 2 and len(window) >= rule.warmup_min_steps / 2:
                medians.append(statistics.median(window))
                reading = clock_mhz() if clock_mhz is not None else None
                if reading is not None:
                    clocks.append(reading)
                steady = _agree(medians, rule.steady)
                steady = steady and (not clocks or _agree(clocks, rule.steady))
                window, opened = [], now


def _agree(values: list[float], tolerance: float) -> bool:
    """Whether the last two of them exist and differ by at most this fraction."""
    last = values[-2:]
    return len(last) == 2 and max(last) - min(last) <= tolerance * max(last)


def time_fn(
    step: Step,
    timer: Timer,
    rule: Rule,
    *,
    prepare: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
    clock_mhz: Callable[[], float | None] | None = None,
) -> Timing:
    """Sample `step` until the rule stops it; step, prepare, clock and what is raised as in Sampler.

    clock_mhz   as in Sampler.warm_up
    """
    sampler = Sampler(step, timer, prepare=prepare, clock=clock)
    try:
        warmup = sampler.warm_up(rule, clock_mhz)
        samples, bursts, stop = _series(sampler, rule, sleep)
        return Timing(**asdict(warmup), samples_ms=samples, bursts=bursts, stop_rule=stop)
    finally:
        timer.close()


def _series(
    sampler: Sampler, rule: Rule, sleep: Callable[[float], object]
) -> tuple[list[float], list[int], StopRule]:
    """All samples, the number of them in each burst, and what ended them."""
    samples: list[float] = []
    bursts: list[int] = []
    longest = max(rule.min_samples, math.ceil(rule.max_samples / BURSTS))
    started = sampler.clock()

    def limit() -> StopRule | None:
        if len(samples) < rule.min_samples:
            return None
        if len(samples) >= rule.max_samples:
            return "samples"
        return "time" if sampler.clock() - started >= rule.max_time_s else None

    stop: StopRule | None = None
    while stop is None:
        # A step that fills a burst alone is neither helped by a gap nor worth doing twice.
        if bursts and bursts[-1] > 1:
            sleep(rule.gap_s)
            sampler.sample_ms()  # what the gap has let go idle is not part of a sample
        before = len(samples)
        for sample in itertools.islice(sampler.burst(rule.burst_s), longest):
            samples.append(sample)
            stop = limit()
            if stop is not None:
                break
        bursts.append(len(samples) - before)
        enough = len(bursts) >= BURSTS and len(samples) >= rule.min_samples
        if enough and stats.relative_half_width(samples, rule.confidence) <= rule.rel_half_width:
            stop = "precision"
    return samples, bursts, stop


class CpuTimer:
    """Wall clock. Caches are in whatever state the previous step left them."""

    name = "perf_counter"
    l2 = "not flushed"

    def sample_ms(self, step: Step) -> float:
        start = perf_counter_ns()
        result = step()  # held, so that the graph is freed after the clock was read
        end = perf_counter_ns()
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
