from collections.abc import Callable, Iterator
from itertools import count, cycle

import pytest

from resblock_bench.bench.timing import CpuTimer, Rule, Timing, time_fn


class ScriptedTimer:
    """Hands out given samples and advances a clock by them."""

    name = "scripted"
    l2 = "none"

    def __init__(self, samples: Iterator[float]) -> None:
        self.samples = samples
        self.now_s = 0.0
        self.closed = False

    def sample_ms(self, step: Callable[[], object]) -> float:
        step()
        sample = next(self.samples)
        self.now_s += sample / 1e3
        return sample

    def close(self) -> None:
        self.closed = True


def timed(samples: Iterator[float], **rule: float) -> tuple[Timing, ScriptedTimer]:
    timer = ScriptedTimer(samples)
    chosen = Rule(**{"warmup_s": 0.0, "warmup_min_steps": 0, **rule})  # type: ignore[arg-type]
    return time_fn(lambda: None, timer, chosen, clock=lambda: timer.now_s), timer


def test_stops_when_the_median_is_known_well_enough() -> None:
    noisy = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    steady = cycle([1.0])
    timing, _ = timed((*noisy, *[1.0] * 100).__iter__(), min_samples=6)
    assert timing.stop_rule == "precision"
    assert len(timing.samples_ms) > 6
    assert len(timed(steady, min_samples=6)[0].samples_ms) == 6


def test_takes_the_smallest_number_of_samples_whatever_the_rest_says() -> None:
    timing, _ = timed(cycle([5000.0]), min_samples=9, max_time_s=0.001)
    assert len(timing.samples_ms) == 9


def test_stops_at_the_time_limit() -> None:
    # Alternating samples never narrow the interval.
    timing, _ = timed(cycle([10.0, 20.0]), max_time_s=1.0)
    assert timing.stop_rule == "time"
    assert sum(timing.samples_ms[:-1]) < 1000.0 <= sum(timing.samples_ms)


def test_stops_at_the_largest_number_of_samples() -> None:
    timing, _ = timed(cycle([10.0, 20.0]), max_samples=11, max_time_s=1e9)
    assert (timing.stop_rule, len(timing.samples_ms)) == ("samples", 11)


def test_warm_up_lasts_as_long_as_asked_and_is_not_sampled() -> None:
    timing, _ = timed((float(n) for n in count(100)), warmup_s=0.3, max_samples=8)
    assert timing.warmup_steps == 3  # 100 + 101 + 102 ms
    assert timing.warmup_s == pytest.approx(0.303)
    assert timing.samples_ms[0] == 103.0


def test_warm_up_runs_the_smallest_number_of_steps() -> None:
    assert timed(cycle([1.0]), warmup_min_steps=4)[0].warmup_steps == 4


def test_no_sample_is_removed() -> None:
    samples = [1.0] * 7 + [1000.0]
    assert timed(iter(samples), min_samples=8)[0].samples_ms == samples


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
        Rule(warmup_s=0, warmup_min_steps=1, min_samples=6, max_samples=6),
        prepare=lambda: events.append("prepare"),
    )
    assert events == ["prepare", "start", "step", "end"] * 7


def test_the_timer_is_closed_also_when_the_step_fails() -> None:
    timer = ScriptedTimer(cycle([1.0]))
    with pytest.raises(ZeroDivisionError):
        time_fn(lambda: 1 // 0, timer, Rule())
    assert timer.closed
    assert timed(cycle([1.0]))[1].closed


def test_wall_clock_samples_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1_000_000, 3_500_000])
    monkeypatch.setattr("time.perf_counter_ns", lambda: next(ticks))
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

    monkeypatch.setattr("time.perf_counter_ns", tick)
    CpuTimer().sample_ms(Result)
    assert events == ["tick", "tick", "freed"]
