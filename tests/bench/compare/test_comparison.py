"""How many rounds a comparison takes and what it concludes, with rounds that are made up."""

import math
import random

import pytest
from support.comparing import a_round

from resblock_bench.bench.compare.comparison import STAGES, Comparison
from resblock_bench.bench.compare.verdict import DEFAULT_TOLERANCE
from resblock_bench.bench.lockstep.rounds import ATTEMPTS, Round, RoundError


class Machine:
    """Makes rounds with the given ratio and noise, and remembers the order of cells."""

    def __init__(self, ratios, noise=0.005, seed=0):
        self.ratios, self.noise, self.draw = ratios, noise, random.Random(seed)
        self.order = []

    def measure(self, task):
        self.order.append(task.cell)
        ratio = self.ratios[task.cell]
        ratio = ratio(self.order.count(task.cell)) if callable(ratio) else ratio
        if isinstance(ratio, (Round, Exception)):
            if isinstance(ratio, Exception):
                raise ratio
            return ratio
        return a_round(ratio * math.exp(self.draw.gauss(0, self.noise)))


@pytest.fixture
def compare(make_task):
    """Compare cells of which each has a ratio: a number, or a function of the round's number."""

    def run(*ratios, noise=0.005, seed=0):
        tasks = [make_task(batch=1 + i) for i in range(len(ratios))]
        machine = Machine({t.cell: r for t, r in zip(tasks, ratios, strict=True)}, noise, seed)
        comparison = Comparison(tasks, machine.measure, DEFAULT_TOLERANCE, random.Random(seed))
        return comparison.carry_out(), machine

    return run


def words(items):
    return [item.verdict.word for item in items]


def test_every_ratio_gets_its_word(compare):
    items, _ = compare(1.0, 1.06, 0.94)
    assert words(items) == ["SAME", "SLOW", "FAST"]
    assert [item.confirmed for item in items] == [None, True, True]


def test_rounds_of_all_cells_are_shuffled(compare):
    _, machine = compare(*[1.0] * 6, noise=0.001)
    sweeps = [machine.order[i : i + 6] for i in range(0, 30, 6)]
    assert all(len(set(sweep)) == 6 for sweep in sweeps)
    assert len({tuple(cell.batch for cell in sweep) for sweep in sweeps}) > 1


def test_more_rounds_while_ambiguous_and_no_more_than_that(compare):
    items, machine = compare(1.0, 1.02, noise=0.001)
    assert words(items) == ["SAME", "AMBIGUOUS"]
    assert [item.counts for item in items] == [(STAGES[0],) * 2, (STAGES[-1],) * 2]
    assert len(machine.order) == STAGES[0] + STAGES[-1]


def test_what_is_flagged_is_drawn_again_from_nothing(compare):
    """Slow in the first five rounds only: a slow spell, not a slow kernel."""
    items, machine = compare(lambda count: 1.08 if count <= 5 else 1.0, noise=0.002)
    (item,) = items
    assert item.verdict.word == "AMBIGUOUS"
    assert item.confirmed is False
    assert item.confirming_from == 5
    assert len(machine.order) == 10
    assert any("not confirmed" in reason for reason in item.verdict.reasons)


def test_both_draws_together_do_not_confirm(compare):
    """All eighteen rounds say slow, but the thirteen of the second draw do not alone."""
    items, _ = compare(lambda count: 1.08 if count <= 5 else 1.02, noise=0.001)
    (item,) = items
    assert item.verdict.low > 1.02
    assert (item.verdict.word, item.confirmed) == ("AMBIGUOUS", False)


def test_a_second_draw_on_a_disturbed_machine_confirms_nothing(compare):
    items, _ = compare(
        lambda count: 1.08 if count <= 5 else a_round(1.08, disturbances=["throttled"]), noise=0.002
    )
    (item,) = items
    assert (item.verdict.word, item.confirmed) == ("AMBIGUOUS", False)
    assert "its second draw has too few valid rounds" in item.verdict.reasons[-1]


def test_disturbed_rounds_do_not_count_and_are_taken_again(compare):
    items, machine = compare(
        lambda n: a_round(9.0, disturbances=["throttled"]) if n % 3 == 0 else 1.0
    )
    (item,) = items
    assert item.verdict.word == "SAME"
    assert len(item.rounds) == 5
    assert len(item.disturbed) == 2
    assert len(machine.order) == 7


def test_too_few_valid_rounds_are_no_verdict(compare):
    items, machine = compare(lambda n: a_round(1.0, disturbances=["throttled"]))
    (item,) = items
    assert item.verdict.word == "AMBIGUOUS"
    assert "disturbed" in "; ".join(item.verdict.reasons)
    assert len(machine.order) == ATTEMPTS * STAGES[-1]


@pytest.mark.parametrize("valid", range(STAGES[0]))
def test_four_valid_rounds_or_fewer_are_no_verdict_however_clear(compare, valid):
    disturbed = a_round(1.5, disturbances=["hot"])
    items, machine = compare(lambda count: 1.5 if count <= valid else disturbed, noise=0.001)
    assert words(items) == ["AMBIGUOUS"]
    assert len(machine.order) == ATTEMPTS * STAGES[-1]


def test_a_crash_ends_the_rounds_of_its_cell_alone(compare):
    error = RoundError("crashed", "head: killed")
    items, machine = compare(lambda n: error if n == 2 else 1.0, 1.0)
    assert items[0].failed == ("crashed", "head: killed")
    assert (items[1].failed, items[1].verdict.word) == (None, "SAME")
    assert len(machine.order) == 2 + 5


def test_an_interrupted_comparison_says_what_it_knows(make_task):
    task, other = make_task(batch=1), make_task(batch=2)
    rounds = iter([1.0] * 12)

    def measure(task):
        ratio = next(rounds, None)
        if ratio is None:
            raise KeyboardInterrupt
        return a_round(1.1 if task.cell.batch == 2 else 1.0)

    comparison = Comparison([task, other], measure, DEFAULT_TOLERANCE, random.Random(0))
    with pytest.raises(KeyboardInterrupt):
        comparison.carry_out()
    same, flagged = comparison.results()
    assert same.verdict.word == "SAME"
    assert (flagged.verdict.word, flagged.confirmed) == ("AMBIGUOUS", False)


def test_false_alarms_and_catches_of_a_machine_that_drifts(compare):
    """measurement.md's machine: 1.4 % noise a round. 40 comparisons of 5 cells each way."""
    alarms = catches = 0
    for seed in range(40):
        alarms += sum(
            word == "SLOW" for word in words(compare(*[1.0] * 5, noise=0.014, seed=seed)[0])
        )
        catches += words(compare(1.07, 1.0, 1.0, noise=0.014, seed=seed)[0])[0] == "SLOW"
    assert alarms == 0
    assert catches >= 38
