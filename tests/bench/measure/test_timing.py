from collections.abc import Callable, Iterator
from itertools import chain, count, cycle

import numpy as np
import pytest
from msgspec.structs import replace

from resblock_bench.bench.measure import timing
from resblock_bench.bench.measure.stats import relative_half_width
from resblock_bench.bench.measure.timing import (
    BURSTS,
    DEFAULT_RULE,
    ClockError,
    CpuTimer,
    Sampler,
    Timing,
    time_fn,
)


class ScriptedTimer:
    """Hands out given samples and advances a clock by them."""

    name = "scripted"
    l2 = "none"

    def __init__(self, samples: Iterator[float]) -> None:
        self.samples = samples
        self.now_s = 0.0
        self.slept: list[float] = []
        self.closed = False

    def sample_ms(self, step: Callable[[], object]) -> float:
        step()
        sample = next(self.samples)
        self.now_s += sample / 1e3
        return sample

    def close(self) -> None:
        self.closed = True


def timed(samples: Iterator[float], **rule: float) -> tuple[Timing, ScriptedTimer]:
    """One series on a clock that only steps and gaps advance; no warm-up unless asked for."""
    timer = ScriptedTimer(samples)
    none = {"warmup_s": 0.0, "warmup_max_s": 0.0, "warmup_min_steps": 0, "gap_s": 0.01}
    chosen = replace(DEFAULT_RULE, **{**none, **rule})

    def sleep(seconds: float) -> None:
        timer.now_s += seconds
        timer.slept.append(seconds)

    return time_fn(lambda: None, timer, chosen, clock=lambda: timer.now_s, sleep=sleep), timer


def test_stops_when_the_median_is_known_well_enough() -> None:
    steady, _ = timed(cycle([1.0]), burst_s=0.01)
    assert steady.stop_rule == "precision"
    assert steady.bursts == [10] * BURSTS  # not earlier, however narrow
    noise = np.random.default_rng(0).lognormal(0, 0.1, 10**4).tolist()
    noisy, _ = timed(iter(noise), burst_s=0.01, max_samples=10**4)
    assert noisy.stop_rule == "precision"
    assert relative_half_width(noisy.samples_ms, 0.95) <= DEFAULT_RULE.rel_half_width
    before = noisy.samples_ms[: -noisy.bursts[-1]]
    assert len(noisy.bursts) > BURSTS
    assert relative_half_width(before, 0.95) > DEFAULT_RULE.rel_half_width


def test_takes_the_smallest_number_of_samples_whatever_the_rest_says() -> None:
    timing, _ = timed(cycle([5000.0]), min_samples=9, max_time_s=0.001)
    assert len(timing.samples_ms) == 9


def test_stops_at_the_time_limit() -> None:
    timing, timer = timed(cycle([10.0, 20.0]), max_time_s=1.005)
    assert timing.stop_rule == "time"
    assert timer.now_s - timing.samples_ms[-1] / 1e3 < 1.005 <= timer.now_s


def test_stops_at_the_largest_number_of_samples() -> None:
    timing, _ = timed(cycle([10.0, 20.0]), max_samples=11, max_time_s=1e9)
    assert (timing.stop_rule, len(timing.samples_ms)) == ("samples", 11)


def test_samples_come_in_bursts_with_gaps_between_them() -> None:
    timing, timer = timed(cycle([10.0, 20.0]), burst_s=0.06, gap_s=0.03, max_time_s=1.0)
    assert sum(timing.bursts) == len(timing.samples_ms)
    assert set(timing.bursts[:-1]) == {4}  # 10 + 20 + 10 + 20 ms
    assert timer.slept == [0.03] * (len(timing.bursts) - 1)


def test_a_burst_after_a_gap_begins_with_an_untimed_step() -> None:
    numbers = (1.0 + n for n in count())
    timing, _ = timed(numbers, burst_s=0.0055, min_samples=6, max_samples=6)
    assert timing.bursts == [3, 2, 1]
    assert timing.samples_ms == [1.0, 2.0, 3.0, 5.0, 6.0, 8.0]  # without 4 and 7


def test_a_step_longer_than_a_burst_has_no_gaps() -> None:
    timing, timer = timed(cycle([300.0]), burst_s=0.2)
    assert timing.bursts == [1] * BURSTS
    assert timer.slept == []


def test_the_samples_of_a_quick_step_are_spread_over_the_bursts() -> None:
    timing, _ = timed(cycle([0.001, 0.002]), max_samples=800)
    assert timing.bursts == [100] * BURSTS


@pytest.mark.parametrize(("seconds", "least", "taken"), [(0.05, 1, 3), (0.0, 1, 1), (0.05, 5, 5)])
def test_a_burst_lasts_so_long_and_has_at_least_so_many_samples(
    seconds: float, least: int, taken: int
) -> None:
    timer = ScriptedTimer(count(20.0))  # 20, 21, 22 … ms
    sampler = Sampler(lambda: None, timer, clock=lambda: timer.now_s)
    assert list(sampler.burst(seconds, least)) == [20.0 + n for n in range(taken)]


def test_warm_up_lasts_as_long_as_asked_and_is_not_sampled() -> None:
    timing, _ = timed((float(n) for n in count(100)), warmup_s=0.3, max_samples=8)
    assert timing.warmup_steps == 3  # 100 + 101 + 102 ms
    assert timing.warmup_s == pytest.approx(0.303)
    assert timing.samples_ms[0] == 103.0


def test_warm_up_runs_the_smallest_number_of_steps() -> None:
    assert timed(cycle([1.0]), warmup_min_steps=4)[0].warmup_steps == 4


def test_warm_up_goes_on_until_the_step_is_steady() -> None:
    ramp = chain([float(n) for n in range(40, 20, -1)], cycle([20.0]))
    timing, _ = timed(ramp, warmup_s=0.002, warmup_max_s=10.0)
    assert timing.warmup_steady
    assert timing.warmup_steps == 22  # windows of one step, and 20 differs from 21 by 5 %
    assert set(timing.samples_ms) == {20.0}


def test_warm_up_ends_at_its_limit_where_nothing_is_ever_steady() -> None:
    growing = (10 * 1.1**n for n in count())
    timing, _ = timed(growing, warmup_s=0.02, warmup_max_s=0.2, max_samples=8)
    assert not timing.warmup_steady
    assert 0.2 <= timing.warmup_s < 0.2 * 1.1 + 0.02


@pytest.mark.parametrize(
    ("readings", "steady"),
    [([1000.0], True), ([500.0, 1000.0], False), ([None], True)],
    ids=["steady", "jumping", "unreadable"],
)
def test_warm_up_waits_for_the_device_s_clock(readings: list[float | None], steady: bool) -> None:
    timer, clock_mhz = ScriptedTimer(cycle([10.0])), cycle(readings)
    timing = time_fn(
        lambda: None,
        timer,
        replace(DEFAULT_RULE, warmup_s=0.1, warmup_max_s=0.5),
        clock=lambda: timer.now_s,
        sleep=lambda seconds: None,
        clock_mhz=lambda: next(clock_mhz),
    )
    assert timing.warmup_steady == steady
    assert timing.warmup_s == pytest.approx(0.1 if steady else 0.5, abs=0.011)


@pytest.mark.parametrize("sample", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("place", [0, 12], ids=["warm-up", "sample"])
def test_a_clock_that_jumps_backwards_is_an_error(sample: float, place: int) -> None:
    samples = chain([1.0] * place, [sample], cycle([1.0]))
    with pytest.raises(ClockError, match=f"scripted says that a step took {sample} ms"):
        timed(samples, warmup_min_steps=3)


def test_no_sample_is_removed() -> None:
    samples = [1.0] * 7 + [1000.0]
    assert timed(iter(samples), min_samples=8, max_samples=8)[0].samples_ms == samples


def test_prepare_runs_before_every_step_and_outside_the_timed_span() -> None:
    events: list[str] = []

    class Timer(ScriptedTimer):
        def sample_ms(self, step: Callable[[], object]) -> float:
            events.append("start")
            sample = super().sample_ms(step)
            events.append("end")
            return sample

    time_fn(
        lambda: events.append("step"),
        Timer(cycle([1.0])),
        replace(
            DEFAULT_RULE,
            warmup_s=0,
            warmup_max_s=0,
            warmup_min_steps=1,
            min_samples=6,
            max_samples=6,
        ),
        prepare=lambda: events.append("prepare"),
    )
    assert events == ["prepare", "start", "step", "end"] * 7


def test_the_timer_is_closed_also_when_the_step_fails() -> None:
    timer = ScriptedTimer(cycle([1.0]))
    with pytest.raises(ZeroDivisionError):
        time_fn(lambda: 1 // 0, timer, DEFAULT_RULE)
    assert timer.closed
    assert timed(cycle([1.0]))[1].closed


def test_wall_clock_samples_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1_000_000, 3_500_000])
    monkeypatch.setattr(timing, "perf_counter_ns", lambda: next(ticks))
    assert CpuTimer().sample_ms(lambda: None) == 2.5


def test_what_a_step_returns_is_freed_after_the_clock_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Result:
        def __del__(self) -> None:
            events.append("freed")

    def tick() -> int:
        events.append("tick")
        return len(events)

    monkeypatch.setattr(timing, "perf_counter_ns", tick)
    CpuTimer().sample_ms(Result)
    assert events == ["tick", "tick", "freed"]
