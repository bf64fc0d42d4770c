from itertools import combinations_with_replacement

import numpy as np
import pytest
from scipy.stats import binom, quantile_test, wilcoxon

from resblock_bench.bench.measure.stats import (
    interval_rank,
    median_interval,
    outlier_count,
    ratio_of,
    relative_half_width,
    self_normalised_quantile,
    signed_rank_interval,
)


def correlated(phi, shape, seed=0):
    """exp of first-order autoregressive series along the last axis; their median is 1."""
    noise = np.random.default_rng(seed).normal(size=shape)
    series = np.empty(shape)
    series[..., 0] = noise[..., 0]
    for i in range(1, shape[-1]):
        series[..., i] = phi * series[..., i - 1] + np.sqrt(1 - phi**2) * noise[..., i]
    return np.exp(0.1 * series)


def coverage(rows, median):
    intervals = np.array([median_interval(row, 0.95) for row in rows.tolist()])
    return np.mean((intervals[:, 0] <= median) & (median <= intervals[:, 1]))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [6, 7, 8, 12, 20, 33, 100, 501])
def test_a_median_interval_contains_that_for_independent_samples(
    count: int, confidence: float
) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    theirs = quantile_test(samples, q=0, p=0.5).confidence_interval(confidence)
    ours = median_interval(samples.tolist(), confidence)
    if np.isnan(theirs.low):
        assert ours is None
    else:
        assert ours is not None
        assert ours[0] <= theirs.low
        assert theirs.high <= ours[1]


def test_in_a_series_that_alternates_the_interval_is_that_for_independent_samples() -> None:
    """The partial sums go nowhere."""
    samples = [value for n in range(20) for value in (10.0 + n, 50.0 - n)]
    theirs = quantile_test(samples, q=0, p=0.5).confidence_interval(0.95)
    assert median_interval(samples, 0.95) == (theirs.low, theirs.high)


def test_long_spells_on_one_side_of_the_median_widen_it() -> None:
    """Spells of 20 in 160: the sums go from 0 to ±10 and back, their mean square is 33.375."""
    samples = [
        value for n in range(4) for first in (n, 200 + n) for value in range(first, first + 80, 4)
    ]
    ordered = sorted(samples)  # 6.747 · √33.375 = 38.98, so from rank 80 − 38.98 on
    assert median_interval(samples, 0.95) == (ordered[41], ordered[-42])


@pytest.mark.parametrize("count", [6, 9, 30, 200])
def test_the_rank_is_the_largest_that_still_covers(count: int) -> None:
    rank = interval_rank(count, 0.95)
    miss = 2 * binom.cdf([rank - 1, rank], count, 0.5)
    assert miss[0] <= 0.05 < miss[1]


@pytest.mark.parametrize("count", [6, 8, 15, 60])
def test_independent_samples_are_covered_as_often_as_it_says(count: int) -> None:
    draws = np.random.default_rng(0).exponential(size=(3000, count))
    assert coverage(draws, np.log(2)) >= 0.95 - 0.008  # two standard errors


def test_the_price_of_not_assuming_independence_is_small() -> None:
    draws = np.random.default_rng(0).lognormal(0, 0.1, size=(500, 100))
    widths = [np.subtract(*median_interval(row, 0.95)[::-1]) for row in draws.tolist()]
    binomial = [np.sort(row)[60] - np.sort(row)[39] for row in draws]
    assert 1.0 <= np.median(widths) / np.median(binomial) < 1.5


@pytest.mark.parametrize("phi", [0.5, 0.8])
def test_the_interval_covers_correlated_samples(phi: float) -> None:
    assert coverage(correlated(phi, (1000, 200)), 1.0) >= 0.93
    # where the interval for independent samples is far off
    rank = interval_rank(200, 0.95)
    ordered = np.sort(correlated(phi, (1000, 200)))
    assert np.mean((ordered[:, rank - 1] <= 1) & (ordered[:, -rank] >= 1)) < 0.87


def test_two_measurements_of_one_thing_agree() -> None:
    rows = correlated(0.9, (400, 200))
    low, high = np.array([median_interval(row, 0.95) for row in rows.tolist()]).T
    disjoint = (high[::2] < low[1::2]) | (high[1::2] < low[::2])
    assert np.mean(disjoint) <= 0.05


def test_the_interval_depends_on_the_order() -> None:
    shuffled = np.random.default_rng(0).permutation(100) + 1000.0
    drifting = np.sort(shuffled)
    narrow, wide = (relative_half_width(s.tolist(), 0.95) for s in (shuffled, drifting))
    assert wide > 2 * narrow
    assert median_interval(drifting.tolist(), 0.95) == (drifting[0], drifting[-1])
    assert relative_half_width(drifting[::-1].tolist(), 0.95) == wide


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_quantile_is_that_of_the_self_normalised_wiener_process(confidence: float) -> None:
    rng = np.random.default_rng(0)
    paths = np.cumsum(rng.normal(size=(20_000, 400)), axis=1) / 20
    bridges = paths - paths[:, -1:] * np.arange(1, 401) / 400
    ratios = np.abs(paths[:, -1]) / np.sqrt(np.mean(bridges**2, axis=1))
    assert self_normalised_quantile(confidence) == pytest.approx(
        np.quantile(ratios, confidence), rel=0.03
    )


def test_samples_that_are_all_the_same_have_no_width() -> None:
    assert median_interval([2.0] * 10, 0.95) == (2.0, 2.0)
    assert relative_half_width([2.0] * 10, 0.95) == 0.0


def test_five_samples_have_no_95_per_cent_interval() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.95) is None
    assert relative_half_width([1.0, 1.0, 1.0, 1.0, 1.0], 0.95) == float("inf")


def test_half_width_is_relative_to_the_median() -> None:
    samples = [8.0, 9.0, 10.0, 10.0, 11.0, 12.0]
    assert median_interval(samples, 0.95) == (8.0, 12.0)
    assert relative_half_width(samples, 0.95) == pytest.approx(0.2)


def test_outliers_are_those_beyond_tukeys_fences() -> None:
    # Quartiles 2 and 4, fences at -1 and 7.
    assert outlier_count([1, 2, 3, 4, 5]) == 0
    assert outlier_count([-1.5, 2, 2, 3, 4, 4, 7.5]) == 2
    assert outlier_count([1, 2, 3, 4, 7]) == 0


def test_a_rank_that_covers_exactly_as_often_as_asked_is_taken() -> None:
    """Both of two samples on one side of the median: 1/4 each way, exactly."""
    assert interval_rank(2, 0.5) == 1
    assert interval_rank(6, 1 - 2 / 64) == 1


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.975])
@pytest.mark.parametrize("count", [7, 8, 13, 40])
def test_a_signed_rank_interval_holds_what_the_test_does_not_refuse(
    count: int, confidence: float
) -> None:
    values = np.random.default_rng(count).standard_t(3, size=count) + 0.3
    center, interval = signed_rank_interval(values.tolist(), confidence)
    means = sorted((a + b) / 2 for a, b in combinations_with_replacement(values, 2))
    assert center == pytest.approx(np.median(means))
    assert interval is not None
    for bound, outside in zip(interval, (-1, 1), strict=True):
        for shift, refused in ((1e-9 * outside, True), (-1e-9 * outside, False)):
            chance = wilcoxon(values - bound - shift, method="exact").pvalue
            assert (chance <= 1 - confidence) == refused


def test_too_few_differences_have_a_center_alone() -> None:
    assert signed_rank_interval([0.1, 0.2, 0.4], 0.95) == (pytest.approx(0.225), None)
    assert signed_rank_interval([0.1] * 5, 0.95)[1] is None
    assert signed_rank_interval([0.1] * 6, 0.95)[1] == (0.1, 0.1)


def test_of_very_many_differences_neighbours_are_taken_together() -> None:
    rng = np.random.default_rng(0)
    center, interval = signed_rank_interval(rng.normal(1.0, 0.1, 100_000).tolist(), 0.95)
    assert interval is not None
    assert interval[0] < 1.0 < interval[1]
    assert center == pytest.approx(1.0, abs=0.002)
    assert 0.0004 < interval[1] - interval[0] < 0.0025  # of the mean 0.0012


def test_a_ratio_is_that_of_as_many_samples_of_both() -> None:
    """Of the one that is faster more fit into a burst, and later ones are others."""
    slow, fast = [[2.0]] * 12, [[1.0, 9.0, 9.0]] * 12
    ratio = ratio_of(slow, fast, 0.95)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio_of(fast, slow, 0.95).value == 0.5


def test_what_processes_differ_by_is_in_a_ratios_interval() -> None:
    logs = np.random.default_rng(0).normal(0.1, 0.05, 20)
    theirs, own = [[float(value)] for value in np.exp(logs)], [[1.0]] * 20
    center, (low, high) = signed_rank_interval(logs.tolist(), 0.95)  # type: ignore[misc]
    alone = ratio_of(theirs, own, 0.95)
    assert np.log([alone.value, alone.low, alone.high]) == pytest.approx((center, low, high))
    wider = ratio_of(theirs, own, 0.95, between=0.02)
    assert wider.value == alone.value
    reach = np.hypot([low - center, high - center], 1.959964 * 0.02)
    assert np.log([wider.low, wider.high]) == pytest.approx([center - reach[0], center + reach[1]])
    assert ratio_of(theirs, own, 0.99, between=9.0).low == pytest.approx(
        np.exp(center - 2.5758293 * 9)
    )
