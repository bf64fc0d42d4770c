"""Order statistics of timing samples; nothing here assumes a distribution.

The interval of the median is the binomial one: of n independent samples the number below the
median is Binomial(n, 1/2), so with j the largest index for which P(B ≤ j − 1) ≤ (1 − c)/2, the j-th
smallest and the j-th largest sample enclose the median with probability at least c
(Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2).
"""

import functools
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr


@functools.cache
def interval_rank(count: int, confidence: float) -> int:
    """j above, counted from 1; 0 where `count` samples are too few (6 are needed for 95 %)."""
    cumulative = bdtr(np.arange(count), count, 0.5)  # P(B ≤ 0), P(B ≤ 1), …
    return int(np.searchsorted(cumulative, (1 - confidence) / 2, side="right"))


def median_interval(samples: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """The interval that covers the median with at least `confidence`; None if too few samples."""
    rank = interval_rank(len(samples), confidence)
    if rank == 0:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def relative_half_width(samples: Sequence[float], confidence: float) -> float:
    """Half the median's interval over the median; infinite where there is no interval yet."""
    interval = median_interval(samples, confidence)
    if interval is None:
        return float("inf")
    return (interval[1] - interval[0]) / 2 / statistics.median(samples)


def outlier_count(samples: Sequence[float]) -> int:
    """Samples beyond Tukey's fences, 1.5 interquartile ranges outside the quartiles."""
    first, third = np.percentile(samples, [25, 75])
    reach = 1.5 * (third - first)
    return sum(not first - reach <= sample <= third + reach for sample in samples)
