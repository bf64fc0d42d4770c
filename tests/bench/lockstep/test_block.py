"""Blocks whose parties are made up: who takes turns when, and what becomes of their samples."""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import groupby

import numpy as np
import pytest
from msgspec.structs import replace
from support.parties import Events, Scripted

from resblock_bench.bench.lockstep import block
from resblock_bench.bench.lockstep.block import measure_block, take_turns
from resblock_bench.bench.lockstep.turns import Turns
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.floor import floor_of
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.measure.timing import DEFAULT_RULE
from resblock_bench.bench.records import Ceilings, Ratio, Row, Rule, Status

VARIANTS = [(impl, mode) for impl in ("reference", "fused") for mode in ("none", "full")]
SIX = replace(DEFAULT_RULE, burst_s=0.0, gap_s=0.0, min_samples=6, max_samples=6)
Samples = Callable[[int], list[float]]


def name(task: Task) -> str:
    return f"{task.cell.impl}/{task.cell.checkpoint}"


@pytest.fixture
def tasks(make_task: Callable[..., Task]) -> list[Task]:
    """The four variants of a block, on a machine whose ceilings nobody measured."""
    return [
        make_task(impl=impl, checkpoint=mode, rule=SIX, environment=without_ceilings(make_task()))
        for impl, mode in VARIANTS
    ]


def without_ceilings(task: Task) -> object:
    return replace(task.environment, ceilings=None)


class Stage:
    """Starts scripted parties: by variant their samples, and at which step they end.

    `ends` of a variant are those of its tries in turn.
    """

    def __init__(
        self,
        ends: Mapping[str, list[Mapping[str, Status]]] | None = None,
        samples: Mapping[str, Samples] | None = None,
        **common: object,
    ) -> None:
        self.ends, self.samples, self.common = dict(ends or {}), dict(samples or {}), common
        self.events: Events = []
        self.parties: list[Scripted] = []

    def __call__(self, task: Task) -> Scripted:
        self.events.append(("start", task.cell))
        tries = sum(party.task.cell == task.cell for party in self.parties)
        ends = dict(enumerate(self.ends.get(name(task), ()))).get(tries, {})
        samples = self.samples.get(name(task), lambda number: [10.0])
        party = Scripted(task, samples, ends, self.events, **self.common)  # type: ignore[arg-type]
        self.parties.append(party)
        return party

    def names(self, *steps: str) -> list[str]:
        """Of the events with these names, whose they are."""
        return [f"{c.impl}/{c.checkpoint}" for step, c in self.events if step in steps]


def measured(tasks: list[Task], stage: Stage) -> dict[str, Row]:
    rows = measure_block(tasks, stage, lambda task: None)
    assert [row.axes for row in rows] == [task.cell for task in tasks]
    return {f"{row.axes.impl}/{row.axes.checkpoint}": row for row in rows}


def test_one_starts_when_those_before_are_warm(tasks: list[Task]) -> None:
    """Who has started computes: its check, its memory and its warm-up are nobody else's."""
    stage = Stage()
    measured(tasks, stage)
    opening = [step for step, _ in stage.events][: 2 * len(tasks)]
    assert opening == ["start", "open"] * len(tasks)
    assert stage.names("start") == stage.names("open")


def test_everybody_has_a_burst_a_round_in_an_order_drawn_anew(tasks: list[Task]) -> None:
    rule = replace(SIX, min_samples=40, max_samples=40)
    stage = Stage()
    measured([replace(task, rule=rule) for task in tasks], stage)
    orders = [stage.names(f"burst {number}") for number in range(1, 41)]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(map(name, tasks)))}
    bursts = [step for step, _ in stage.events if step.startswith("burst")]
    assert [step for step, _ in groupby(bursts)] == [f"burst {n}" for n in range(1, 41)]
    assert len(set(map(tuple, orders))) > 10
    firsts = Counter(order[0] for order in orders)
    assert set(firsts) == set(map(name, tasks))
    again = Stage()
    measured([replace(task, rule=rule) for task in tasks], again)
    assert [again.names(f"burst {number}") for number in range(1, 41)] == orders  # by the seed


def test_a_row_has_its_rounds_and_its_ratios(tasks: list[Task]) -> None:
    """What changes from round to round changes for all of its parties."""

    def of(ms: float) -> Samples:
        return lambda number: [ms * number] * 2

    samples = {"reference/none": 10.0, "reference/full": 15.0, "fused/none": 8.0, "fused/full": 6.0}
    rule = replace(SIX, min_samples=200, max_samples=200)
    stage = Stage(samples={variant: of(ms) for variant, ms in samples.items()})
    rows = measured([replace(task, rule=rule) for task in tasks], stage)
    assert len({row.block for row in rows.values()}) == 1
    assert {row.status for row in rows.values()} == {"ok"}
    for variant, row in rows.items():
        assert row.rounds == [2] * 100
        same = samples["reference/" + variant.partition("/")[2]] / samples[variant]
        to_none = 10.0 / samples[variant]
        for ratio, value in ((row.ratio, same), (row.ratio_to_none, to_none)):
            # Rounds that all say the same leave what processes differ by; nobody does from itself.
            reach = 1.0 if value == 1.0 else math.exp(1.959964 * 0.0075)
            assert astuple(ratio) == pytest.approx((value, value / reach, value * reach))
    assert measured(tasks, Stage())["fused/full"].block != rows["fused/full"].block


def astuple(ratio: Ratio | None) -> tuple[float | None, ...]:
    assert ratio is not None
    return ratio.value, ratio.low, ratio.high


def test_without_a_reference_there_is_no_ratio(tasks: list[Task]) -> None:
    rows = measured(tasks[2:], Stage())
    assert {row.ratio for row in rows.values()} == {None}
    rows = measured([tasks[0], tasks[3]], Stage())
    assert rows["fused/full"].ratio is None
    assert rows["fused/full"].ratio_to_none is not None


@pytest.mark.parametrize("status", ["crashed", "timeout", "failed", "wrong", "oom"])
@pytest.mark.parametrize("step", ["open", "read 1", "burst 1", "burst 4", "read 2", "finish"])
def test_one_that_is_lost_costs_the_others_nothing(
    tasks: list[Task], step: str, status: Status
) -> None:
    stage = Stage({"reference/full": [{step: status}] * 3})
    rows = measured(tasks, stage)
    lost = rows.pop("reference/full")
    assert (lost.status, lost.reason) == (status, f"ended at {step}")
    assert (lost.ratio, lost.ratio_to_none) == (None, None)
    assert {row.status for row in rows.values()} == {"ok"}
    assert {len(row.samples_ms or ()) for row in rows.values()} == {6}
    assert rows["fused/none"].ratio is not None
    assert rows["fused/full"].ratio is None
    assert rows["fused/full"].ratio_to_none is not None
    # Nobody is asked anything once it has ended.
    at = [number for number, (what, cell) in enumerate(stage.events) if what == step]
    last = max(n for n in at if stage.events[n][1] == lost.axes)
    assert lost.axes not in [cell for _, cell in stage.events[last + 1 :]]


def test_where_all_are_lost_all_have_rows(tasks: list[Task]) -> None:
    stage = Stage({name(task): [{"burst 2": "crashed"}] for task in tasks})
    rows = measured(tasks, stage)
    assert {row.status for row in rows.values()} == {"crashed"}


@pytest.mark.parametrize("count", [1, 6, 17, 250])
def test_so_many_samples_are_so_many_for_each_and_from_several_rounds(
    tasks: list[Task], count: int
) -> None:
    """However many fit into a burst."""
    rule = replace(SIX, min_samples=count, max_samples=count, max_time_s=1e-9)
    samples = {"fused/none": lambda number: [1.0] * 50, "fused/full": lambda number: [1.0] * 3}
    rows = measured([replace(task, rule=rule) for task in tasks], Stage(samples=samples))
    for row in rows.values():
        assert row.rounds is not None
        assert sum(row.rounds) == len(row.samples_ms or ()) == count
        assert max(row.rounds) <= -(-count // 100)
        assert row.stop_rule == "samples"


def test_what_runs_out_of_memory_beside_others_is_tried_with_less(tasks: list[Task]) -> None:
    """Beside nothing but its reference, then alone; a try that is not short of it ends them."""
    stage = Stage({"fused/full": [{"open": "oom"}]})
    rows = measured(tasks, stage)
    assert stage.names("start")[4:] == ["reference/full", "fused/full"]
    assert (rows["fused/full"].status, rows["fused/full"].block) != (
        "oom",
        rows["fused/none"].block,
    )
    assert rows["fused/full"].ratio is not None
    assert rows["fused/full"].ratio_to_none is None  # it had no turns with that one

    stage = Stage({"fused/full": [{"open": "oom"}, {"burst 3": "oom"}]})
    rows = measured(tasks, stage)
    assert stage.names("start")[4:] == ["reference/full", "fused/full", "fused/full"]
    assert (rows["fused/full"].status, rows["fused/full"].ratio) == ("ok", None)
    assert rows["reference/full"].block == rows["reference/none"].block  # as it was at first

    stage = Stage({"fused/full": [{"open": "oom"}] * 3})
    assert measured(tasks, stage)["fused/full"].status == "oom"
    assert len(stage.names("start")) == 7


def test_what_runs_out_of_memory_alone_is_not_tried_again(tasks: list[Task]) -> None:
    stage = Stage({"reference/none": [{"open": "oom"}], "reference/full": [{"open": "oom"}] * 2})
    rows = measured(tasks, stage)
    # The first had nobody beside it, and nor had the second then.
    assert stage.names("start") == [*map(name, tasks)]
    assert rows["fused/none"].status == "ok"


def test_a_reference_that_is_short_of_memory_is_tried_alone(tasks: list[Task]) -> None:
    stage = Stage({"reference/full": [{"open": "oom"}]})
    measured(tasks, stage)
    assert stage.names("start")[4:] == ["reference/full"]


def test_an_interrupt_ends_all_of_a_block(tasks: list[Task]) -> None:
    class Interrupted(Stage):
        def __call__(self, task: Task) -> Scripted:
            if len(self.parties) == 3:
                raise KeyboardInterrupt
            return super().__call__(task)

    stage = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        measured(tasks, stage)
    assert stage.names("kill") == [*map(name, tasks[:3])]


# Conditions


def cpu_times(own: float, busy: float) -> Callable[[int], Reading]:
    """Readings ten seconds apart, in which a process computes so long and the machine so long."""
    return lambda number: Reading(
        t_s=10.0 * number, own_cpu_s=1.0 + own * number, busy_cpu_s=100.0 + busy * number
    )


def test_what_all_processes_computed_is_nobody_else_s(tasks: list[Task]) -> None:
    rows = measured(tasks, Stage(reading=cpu_times(own=2.0, busy=8.0)))
    for row in rows.values():
        assert row.conditions is not None
        assert row.conditions.foreign_cpus == 0.0
        assert row.conditions.disturbances == []
    rows = measured(tasks, Stage(reading=cpu_times(own=2.0, busy=13.0)))
    conditions = rows["fused/none"].conditions
    assert conditions is not None
    assert conditions.foreign_cpus == pytest.approx(0.5)
    assert "other programs took 0.50 CPUs" in conditions.disturbances[0]


def test_what_one_computed_that_was_lost_is_not_known(tasks: list[Task]) -> None:
    stage = Stage({"fused/none": [{"burst 3": "crashed"}]}, reading=cpu_times(own=2.0, busy=20.0))
    rows = measured(tasks, stage)
    conditions = rows["fused/full"].conditions
    assert conditions is not None
    assert (conditions.foreign_cpus, conditions.disturbances) == (None, [])
    # Before the first reading nothing was computed that counts.
    stage = Stage({"fused/none": [{"open": "crashed"}]}, reading=cpu_times(own=2.0, busy=6.0))
    conditions = measured(tasks, stage)["fused/full"].conditions
    assert conditions is not None
    assert conditions.foreign_cpus == 0.0


def test_the_other_parties_on_a_gpu_are_not_foreign(tasks: list[Task]) -> None:
    def reading(number: int) -> Reading:
        return Reading(t_s=float(number), foreign_processes=3)

    conditions = measured(tasks, Stage(reading=reading))["fused/none"].conditions
    assert conditions is not None
    assert (conditions.foreign_processes, conditions.disturbances) == (0, [])
    conditions = measured(tasks[:3], Stage(reading=reading))["fused/none"].conditions
    assert conditions is not None
    assert conditions.foreign_processes == 1
    assert "1 other process computed on the GPU" in conditions.disturbances


# Impossible, or only by ceilings that were measured too low


@pytest.fixture
def limited(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Two variants, whose floor is 100 ms by bytes on a machine with these ceilings."""
    ceilings = Ceilings(
        copy_bytes_per_s=1e6, peak_bytes_per_s=1e6, matrix_flops_per_s={"fp32": 1e15}
    )
    environment = replace(tasks[0].environment, ceilings=ceilings)
    return [replace(task, environment=environment) for task in (tasks[0], tasks[2])]


def judged(limited: list[Task], ms: float, newer: float | None) -> tuple[list[Row], int]:
    """The rows of steps of so many milliseconds, and how often the ceilings were measured again."""
    ceilings = limited[0].environment.ceilings
    assert ceilings is not None
    floor = floor_of(limited[0].cell, ceilings, None)
    fast = 1e-3 * floor.bytes / ms  # the rate by which such a step would just be possible
    again: list[Task] = []

    def measure_again(task: Task) -> Ceilings | None:
        again.append(task)
        if newer is None:
            return None
        rate = newer * 1e6 * fast
        return replace(ceilings, copy_bytes_per_s=rate, peak_bytes_per_s=rate)

    stage = Stage(changes={"median_ms": ms, "floor": floor, "samples_ms": [ms]})
    return measure_block(limited, stage, measure_again), len(again)


def test_a_possible_row_has_its_ceilings_once(limited: list[Task]) -> None:
    rows, again = judged(limited, 1e6, None)
    assert ([row.status for row in rows], again) == (["ok", "ok"], 0)
    assert rows[0].floor is not None
    assert rows[0].floor.share is not None


@pytest.mark.parametrize(
    ("newer", "status"),
    [(None, "impossible"), (0.1, "impossible"), (0.5, "impossible"), (2.0, "ok")],
)
def test_ceilings_are_measured_anew_before_a_row_is_impossible(
    limited: list[Task], newer: float | None, status: str
) -> None:
    rows, again = judged(limited, 1.0, newer)
    assert ([row.status for row in rows], again) == ([status] * 2, 1)
    assert all((row.reason is None) == (status == "ok") for row in rows)
    assert rows[0].floor is not None
    if newer == 2.0:
        # A share is by the better of both.
        assert rows[0].floor.share == pytest.approx(0.5)


# When rounds end


def rounds_of(
    tasks: list[Task], rule: Rule, samples: Samples, spent_s: float = 0.0
) -> tuple[str, int, list[float]]:
    """What stopped them, how many there were, and the gaps; a burst takes so many seconds."""
    now, gaps = [0.0], []
    stage = Stage(samples={name(task): samples for task in tasks})
    turns = Turns(random.Random(0))
    for task in tasks:
        turns.open(stage(task))  # type: ignore[arg-type]

    def clock() -> float:
        return now[0] + spent_s * sum(len(party.bursts) for party in stage.parties)

    take_turns(turns, rule, clock, gaps.append)
    rows = list(turns.rows.values())
    return rows[0].stop_rule, len(rows[0].rounds), gaps  # type: ignore[arg-type, return-value]


def test_precision_ends_rounds_not_before_there_are_enough(tasks: list[Task]) -> None:
    rule = replace(DEFAULT_RULE, min_samples=1)
    stop, count, _ = rounds_of(tasks, rule, lambda number: [10.0] * 5)
    assert (stop, count) == ("precision", 12)


@pytest.mark.parametrize(
    "early",
    [Ratio(value=1.0, low=0.94, high=1.06), Ratio(value=1.0, low=None, high=None)],
    ids=["wide", "none"],
)
def test_a_ratio_has_to_be_precise_too(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch, early: Ratio
) -> None:
    def ratio_of(
        other: list[list[float]], own: list[list[float]], confidence: float, between: float
    ) -> Ratio:
        return early if len(own) < 20 else Ratio(value=1.0, low=0.98, high=1.02)

    monkeypatch.setattr(block.stats, "ratio_of", ratio_of)
    rule = replace(DEFAULT_RULE, min_samples=1, rel_half_width=0.05)
    stop, count, _ = rounds_of(tasks[:2], rule, lambda number: [10.0] * 5)
    assert (stop, count) == ("precision", 27)  # asked after 12, 18, 27


def test_the_time_is_that_of_all_variants(tasks: list[Task]) -> None:
    rng = np.random.default_rng(0)
    rule = replace(DEFAULT_RULE, max_time_s=5.0, max_samples=10**6)

    def noisy(number: int) -> list[float]:
        return [float(rng.uniform(5, 20))]

    for some in (tasks[:1], tasks):
        stop, count, gaps = rounds_of(some, rule, noisy, spent_s=0.25)
        assert (stop, count) == ("time", 20)
        assert gaps == []  # a step that fills a burst is not helped by any


def test_samples_are_enough_whatever_the_time(tasks: list[Task]) -> None:
    rule = replace(DEFAULT_RULE, max_time_s=1e-9, min_samples=30, rel_half_width=1e-9)
    stop, count, _ = rounds_of(tasks, rule, lambda number: [10.0 + number] * 2, spent_s=1.0)
    assert (stop, count) == ("time", 15)


def test_who_is_alone_rests_between_bursts(tasks: list[Task]) -> None:
    rule = replace(DEFAULT_RULE, max_samples=1000, min_samples=80)
    assert rounds_of(tasks[:1], rule, lambda number: [10.0] * 10)[2] == [rule.gap_s] * 11
    assert rounds_of(tasks, rule, lambda number: [10.0] * 10)[2] == []


# What the intervals are worth


def log_ratio_intervals(
    tasks: list[Task], blocks: int, slowdown: float, monkeypatch: pytest.MonkeyPatch
) -> list[Ratio]:
    """Of fused to reference, on a machine that slows down for a while now and then.

    Samples vary by 3 %, rounds of either by 1 %; both slow down together, by up to 40 %.
    """
    monkeypatch.setattr(block, "_precise", lambda turns, rule: False)
    monkeypatch.setattr(block, "_ROUNDS", 40)
    rule = replace(DEFAULT_RULE, min_samples=120, max_samples=120)
    pair = [replace(task, rule=rule) for task in (tasks[0], tasks[2])]
    found = []
    for seed in range(blocks):
        rng = np.random.default_rng(seed)
        machine = np.exp(0.4 * np.abs(np.cumsum(rng.normal(0, 0.3, 60))).clip(0, 1))

        def of(share: float, rng=rng, machine=machine) -> Samples:
            def samples(number: int) -> list[float]:
                level = 10 * (1 + share) * machine[number] * np.exp(rng.normal(0, 0.01))
                return (level * np.exp(rng.normal(0, 0.03, 3))).tolist()  # type: ignore[no-any-return]

            return samples

        stage = Stage(samples={"reference/none": of(0.0), "fused/none": of(slowdown)})
        ratio = measured([replace(task, seed=seed) for task in pair], stage)["fused/none"].ratio
        assert ratio is not None
        found.append(ratio)
    return found


def holds(ratio: Ratio, value: float) -> bool:
    assert ratio.low is not None
    assert ratio.high is not None
    return ratio.low <= value <= ratio.high


def test_of_the_same_code_the_interval_misses_one_in_five_per_cent_at_most(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = log_ratio_intervals(tasks, 200, 0.0, monkeypatch)
    missed = sum(not holds(ratio, 1.0) for ratio in ratios)
    # More than 19 of 200 have a chance of a thousandth where each has one of 5 %.
    assert missed <= 19
    half = [(ratio.high - ratio.low) / 2 for ratio in ratios]  # type: ignore[operator]
    assert np.median(half) < 0.03


def test_a_slowdown_of_five_per_cent_is_outside(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = log_ratio_intervals(tasks, 100, 0.05, monkeypatch)
    assert sum(not holds(ratio, 1.0) for ratio in ratios) >= 95
    assert sum(not holds(ratio, 1 / 1.05) for ratio in ratios) <= 12
