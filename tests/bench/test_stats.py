import numpy as np
import pytest
from scipy.stats import binom, quantile_test

from resblock_bench.bench.stats import (
    interval_rank,
    median_interval,
    outlier_count,
    relative_half_width,
)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [6, 7, 8, 12, 20, 33, 100, 501])
def test_the_interval_is_scipys(count: int, confidence: float) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    theirs = quantile_test(samples, q=0, p=0.5).confidence_interval(confidence)
    ours = median_interval(samples.tolist(), confidence)
    assert (ours or (np.nan, np.nan)) == pytest.approx((theirs.low, theirs.high), nan_ok=True)


@pytest.mark.parametrize("count", [6, 9, 30, 200])
def test_the_rank_is_the_largest_that_still_covers(count: int) -> None:
    rank = interval_rank(count, 0.95)
    miss = 2 * binom.cdf([rank - 1, rank], count, 0.5)
    assert miss[0] <= 0.05 < miss[1]


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(4000, 15))
    covered = 0
    for row in draws.tolist():
        low, high = median_interval(row, 0.95) or (np.inf, -np.inf)
        covered += low <= np.log(2) <= high
    exact = 1 - 2 * binom.cdf(interval_rank(15, 0.95) - 1, 15, 0.5)
    assert covered / 4000 == pytest.approx(exact, abs=0.01)
    assert exact >= 0.95


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
