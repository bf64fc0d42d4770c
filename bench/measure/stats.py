"""Order statistics of timing samples; nothing here assumes a distribution or independence.

Two intervals of the median are formed, and the wider one is taken.

The binomial one is right for independent samples: of n the number below the median is
Binomial(n, 1/2), so with j the largest rank for which P(B ≤ j − 1) ≤ (1 − c)/2, the j-th smallest
and the j-th largest sample enclose the median with probability at least c (Conover, Practical
Nonparametric Statistics, 3rd ed., section 3.2).

Samples taken one after the other are not independent: clocks, caches and other programs change
more slowly than a step takes. So the share of samples below the median m is given the width that
the series itself shows, with the partial sums S_t = Σ_{i≤t} (1[x_i < m] + 1[x_i = m]/2 − 1/2), a
random walk that wanders the further the longer the samples stay on one side:

    p = 1/2 ± q·√(Σ_t S_t² / n³),    from the p-quantiles of the samples (Woodruff 1952)

This self-normalised interval (Lobato 2001; Shao 2010, J. R. Stat. Soc. B 72, 343) needs no
bandwidth, no block length and no estimate of the correlation. q is the quantile of
|W(1)| / √∫(W(t) − t·W(1))² dt with W a Wiener process, 6.747 for 95 %. For independent samples the
wider of the two is on average 1.35 times as wide as the binomial one.
"""

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr

from resblock_bench.bench.records import Ratio


@functools.cache
def interval_rank(count: int, confidence: float) -> int:
    """j above, counted from 1; 0 where `count` samples are too few (6 are needed for 95 %)."""
    cumulative = bdtr(np.arange(count), count, 0.5)  # P(B ≤ 0), P(B ≤ 1), …
    return int(np.searchsorted(cumulative, (1 - confidence) / 2, side="right"))


@functools.cache
def self_normalised_quantile(confidence: float) -> float:
    """q above.

    W(1) is normal and independent of the bridge, whose ∫B² has the Laplace transform
    E exp(−s∫B²) = √(u / sinh u), u = √(2s). With Craig's integral for the normal tail,

        P(|W(1)| / √∫B² > q) = 2/π · ∫ √(u / sinh u) dθ over 0 … π/2,    u = q / sin θ
    """
    nodes = 256  # the midpoint rule converges geometrically: all derivatives vanish or are odd
    sine = np.sin((np.arange(nodes) + 0.5) * (np.pi / 2 / nodes))

    def tail(q: float) -> float:
        u = q / sine
        return float(np.mean(np.sqrt(2 * u / -np.expm1(-2 * u)) * np.exp(-u / 2)))

    low, high = 0.0, 1.0
    while tail(high) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 1 - confidence else (low, middle)
    return high


def median_interval(samples: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """The interval of the median of samples in the order taken; None if there are too few.

    It covers the median with at least `confidence` if the samples are independent, and nearly so
    if their correlation is short against the series. It never exceeds the samples' range.
    """
    count = len(samples)
    rank = interval_rank(count, confidence)
    if rank == 0:
        return None
    series = np.asarray(samples)
    sums = np.cumsum(0.5 * np.sign(np.median(series) - series))
    reach = self_normalised_quantile(confidence) * math.sqrt(float(sums @ sums) / count)
    rank = max(1, min(rank, math.floor(count / 2 - reach) + 1))
    ordered = np.sort(series)
    return float(ordered[rank - 1]), float(ordered[-rank])


def relative_half_width(samples: Sequence[float], confidence: float) -> float:
    """Half the median's interval over the median; infinite where there is no interval yet."""
    interval = median_interval(samples, confidence)
    if interval is None:
        return float("inf")
    return (interval[1] - interval[0]) / 2 / statistics.median(samples)


def log_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """log(own / other) of two bursts, from as many samples of each.

    The first ones run on caches that the other side has filled. Of a slower side fewer samples fit
    into a burst, among which these would weigh more and make it look slower still.
    """
    count = min(len(own), len(other))
    return math.log(statistics.median(own[:count]) / statistics.median(other[:count]))


def ratio_of(
    other: Sequence[Sequence[float]],
    own: Sequence[Sequence[float]],
    confidence: float,
    between: float = 0.0,
) -> Ratio:
    """How many times as fast as another one is, from the samples of both in each of their rounds.

    The two of a round lie within some tenths of a second, in which machines change little; which
    of them comes first is drawn by lot, so of equal code a round is as likely to say d as -d,
    whatever the machine does. Under that alone the interval of Wilcoxon's signed ranks is exact.

    between   standard deviation of the log ratio of two processes of the same code, however many
              rounds they take: it is added in quadrature, z·between each way
    """
    # One may have had samples enough before the other.
    logs = [-log_ratio(*pair) for pair in zip(own, other, strict=False)]
    center, interval = signed_rank_interval(logs, confidence)
    if interval is None:
        return Ratio(value=math.exp(center), low=None, high=None)
    least = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * between
    below, above = (math.hypot(bound - center, least) for bound in interval)
    return Ratio(
        value=math.exp(center), low=math.exp(center - below), high=math.exp(center + above)
    )


_MOST_DIFFERENCES = 200
"""Beyond these, neighbours are taken together: the number of their means grows with the square."""


def signed_rank_interval(
    differences: Sequence[float], confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """Center of a symmetric distribution, and its interval, None if there are too few.

    The center is the median of the n(n + 1)/2 means (d_i + d_j)/2, i ≤ j (Hodges, Lehmann 1963),
    the interval goes from the k-th smallest of them to the k-th largest, k being the largest for
    which P(W ≤ k - 1) ≤ (1 - c)/2 of Wilcoxon's signed-rank statistic W (Hollander, Wolfe, Chicken,
    Nonparametric Statistical Methods, 3rd ed., section 3.3). For normal noise it takes 5 % more
    rounds than the mean's, where the median's takes 57 %.
    """
    values = np.asarray(differences)
    if len(values) > _MOST_DIFFERENCES:
        values = np.array([np.median(part) for part in np.array_split(values, _MOST_DIFFERENCES)])
    first, second = np.triu_indices(len(values))
    means = np.sort((values[first] + values[second]) / 2)
    rank = _signed_rank(len(values), confidence)
    interval = None if rank == 0 else (float(means[rank - 1]), float(means[-rank]))
    return float(np.median(means)), interval


@functools.cache
def _signed_rank(count: int, confidence: float) -> int:
    """k above; 0 where `count` differences are too few (6 are needed for 95 %).

    W is the sum of the ranks 1 … n of what is above the center, each of which is in it or not.
    """
    chances = np.ones(1)
    for rank in range(1, count + 1):
        without = np.concatenate([chances, np.zeros(rank)])
        chances = (without + np.roll(without, rank)) / 2
    return int(np.searchsorted(np.cumsum(chances), (1 - confidence) / 2, side="right"))


def outlier_count(samples: Sequence[float]) -> int:
    """Samples beyond Tukey's fences, 1.5 interquartile ranges outside the quartiles."""
    first, third = np.percentile(samples, [25, 75])
    reach = 1.5 * (third - first)
    return sum(not first - reach <= sample <= third + reach for sample in samples)
