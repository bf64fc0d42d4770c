"""The statistics of verdicts, on numbers whose answer is known."""

import math
import random
import statistics

import pytest
from scipy import stats

from resblock_bench.bench.compare.verdict import (
    DEFAULT_TOLERANCE,
    Estimate,
    Tolerance,
    benjamini_hochberg,
    judge,
    paired,
    smallest_detectable,
    unpaired,
)

NOISE = [1.004, 0.997, 1.001, 0.999, 1.0]


def in_pairs(base, head):
    logs = [math.log(h / b) for b, h in zip(base, head, strict=True)]
    return paired(logs, base, head)


def verdict(ratio, noise=NOISE, base=10.0, tolerance=DEFAULT_TOLERANCE):
    heads = [base * ratio * factor for factor in noise]
    return judge([in_pairs([base] * len(noise), heads)], tolerance)[0]


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        (1.05, "SLOW"),
        (0.95, "FAST"),
        (1.0, "SAME"),
        # Certainly slower and faster, by less than the tolerance.
        (1.01, "SAME"),
        (0.99, "SAME"),
        (1.02, "AMBIGUOUS"),
        (0.98, "AMBIGUOUS"),
    ],
)
def test_a_word_for_every_ratio(ratio, word):
    found = verdict(ratio)
    assert found.word == word
    assert found.ratio == pytest.approx(ratio * math.prod(NOISE) ** 0.2)
    assert found.low < found.ratio < found.high


def test_bounds_are_those_of_the_paired_t_test():
    base, head = [10.0, 11.0, 9.5, 10.2], [10.6, 11.2, 10.1, 10.9]
    estimate = in_pairs(base, head)
    logs = [math.log(h / b) for b, h in zip(base, head, strict=True)]
    low, high = stats.t.interval(
        0.90, 3, statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(4)
    )
    assert estimate.bound(-1) == pytest.approx(low)
    assert estimate.bound(1) == pytest.approx(high)


def test_between_two_processes_the_calibrated_spread_is_what_there_is():
    assert unpaired(10.0, 11.0, None) is None
    estimate = unpaired(10.0, 11.0, 0.01)
    assert estimate.mean == pytest.approx(math.log(1.1))
    assert estimate.error == pytest.approx(0.01 * math.sqrt(2))
    assert judge([estimate], DEFAULT_TOLERANCE)[0].word == "SLOW"
    assert judge([unpaired(10.0, 11.0, 0.1)], DEFAULT_TOLERANCE)[0].word == "AMBIGUOUS"


def test_few_rounds_are_no_verdict():
    found = judge([in_pairs([10.0, 10.0], [20.0, 20.0])], DEFAULT_TOLERANCE)[0]
    assert (found.word, found.ratio) == ("AMBIGUOUS", None)


def test_a_difference_below_the_absolute_floor_is_none():
    tolerance = Tolerance(relative=0.02, absolute_ms=1e-3)
    assert verdict(1.5, base=0.0015, tolerance=tolerance).word == "SAME"
    assert verdict(1.5, base=0.0030, tolerance=tolerance).word == "SLOW"


def test_medians_that_drift_apart_from_their_pairs_hide_no_slowdown():
    """Of 100 comparisons with 5 % spun in, one was passed for medians that happened to agree."""
    drifting = Estimate(math.log(1.05), 0.005, 9, 2.0, 2.0)
    assert judge([drifting], DEFAULT_TOLERANCE)[0].word == "SLOW"


def test_one_suspect_among_many_is_chance():
    """p = 0.02 is a discovery alone and none among a hundred cells that are the same."""
    error = 0.01
    mean = math.log1p(0.02) + error * float(stats.t.ppf(0.98, 4))
    suspect = Estimate(mean, error, 4, 10.0, 10.5)
    same = Estimate(0.0, 0.001, 4, 10.0, 10.0)
    assert judge([suspect], DEFAULT_TOLERANCE)[0].word == "SLOW"
    assert judge([suspect] + [same] * 99, DEFAULT_TOLERANCE)[0].word == "AMBIGUOUS"


def test_benjamini_hochberg_as_scipy_has_it():
    draw = random.Random(3)
    values = [draw.random() ** 4 for _ in range(40)]
    adjusted = stats.false_discovery_control(values)
    threshold = benjamini_hochberg(values, 0.05)
    assert [v <= threshold for v in values] == [a <= 0.05 for a in adjusted]
    assert any(a <= 0.05 for a in adjusted)
    assert benjamini_hochberg([0.9, 0.8], 0.05) == 0


def test_the_smallest_detectable_slowdown_is_seen_four_times_in_five():
    spread, rounds, trials = 0.01, 9, 2000
    draw = random.Random(7)
    slowdown = 1 + smallest_detectable(DEFAULT_TOLERANCE, spread / 3, rounds - 1)
    caught = 0
    for _ in range(trials):
        heads = [slowdown * math.exp(draw.gauss(0, spread)) for _ in range(rounds)]
        caught += judge([in_pairs([1.0] * rounds, heads)], DEFAULT_TOLERANCE)[0].word == "SLOW"
    assert 0.75 < caught / trials < 0.85
