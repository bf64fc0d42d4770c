"""Verdicts on a cell from its rounds: SLOW, FAST, SAME or AMBIGUOUS.

The unit is the round, d its log(head / base): samples within a process are far more alike than
processes are, so pooling them finds differences where there are none. Of R rounds with
mean d̄ and standard deviation s, and with t the quantile of Student's distribution for R − 1
degrees of freedom, the one-sided 95 % bounds are d̄ ± t·s/√R. With the tolerance τ, what two runs
of the same code may differ by on this machine:

    SLOW        lower bound > log(1 + τ), and |e^d̄ − 1| · the base's median > the absolute floor
    FAST        upper bound < −log(1 + τ), likewise
    SAME        both bounds within ±log(1 + τ), by two one-sided tests (Schuirmann 1987), or a
                difference below the absolute floor
    AMBIGUOUS   else

Over the cells of a comparison SLOW and FAST also have to pass the procedure of Benjamini and
Hochberg (1995), which keeps the expected share of false ones among them below ALPHA.

The smallest regression that would have been seen with probability POWER is
τ ⊕ (t(1 − ALPHA) + t(POWER))·s/√R, on the log scale.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtr, stdtrit

from resblock_bench.bench.records import NonNegative, Record

ALPHA = 0.05
POWER = 0.8
MIN_ROUNDS = 3
"""Of fewer no spread can be told."""

Word = Literal["SAME", "FAST", "SLOW", "AMBIGUOUS"]


class Tolerance(Record, frozen=True, kw_only=True):
    """What counts as no change: a relative difference τ, and an absolute one in milliseconds."""

    relative: NonNegative
    absolute_ms: NonNegative


DEFAULT_TOLERANCE = Tolerance(relative=0.02, absolute_ms=1e-3)
"""Where the machine was not calibrated."""
LEAST_TOLERANCE = Tolerance(relative=0.01, absolute_ms=1e-3)
"""No calibration goes below this."""


@dataclass(frozen=True)
class Estimate:
    """log(head / base): its mean, the standard error of that, and degrees of freedom.

    base_ms, head_ms: medians over the rounds.
    """

    mean: float
    error: float
    freedom: float
    base_ms: float
    head_ms: float

    def bound(self, side: Literal[-1, 1]) -> float:
        """The one-sided 95 % bound below (−1) or above (+1)."""
        return self.mean + side * float(stdtrit(self.freedom, 1 - ALPHA)) * self.error


def paired(
    logs: Sequence[float], base_ms: Sequence[float], head_ms: Sequence[float]
) -> Estimate | None:
    """The estimate from rounds that measured both sides; None if they are too few.

    logs   log(head / base) of each round
    """
    count = len(logs)
    if count < MIN_ROUNDS:
        return None
    return Estimate(
        statistics.fmean(logs),
        statistics.stdev(logs) / math.sqrt(count),
        count - 1,
        statistics.median(base_ms),
        statistics.median(head_ms),
    )


def unpaired(base_ms: float, head_ms: float, spread: float | None) -> Estimate | None:
    """The estimate from one process of each side, measured apart; None without a calibration.

    spread   the calibrated standard deviation of log(median) between processes of the same code
    """
    if spread is None:
        return None
    mean, error = math.log(head_ms / base_ms), spread * math.sqrt(2)
    return Estimate(mean, error, CALIBRATED_FREEDOM, base_ms, head_ms)


CALIBRATED_FREEDOM = 4
"""Degrees of freedom of a calibrated spread: it comes from at least five rounds."""


class Verdict(Record, frozen=True, kw_only=True):
    """What the rounds of a cell say; `low`, `high` are the one-sided bounds of the ratio.

    `detectable` is the relative slowdown that would have been seen with 80 % probability, and
    `reasons` say which rule decided. Without an estimate there is no number.
    """

    word: Word
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    reasons: list[str]


def judge(estimates: Sequence[Estimate | None], tolerance: Tolerance) -> list[Verdict]:
    """The verdicts on the cells of one comparison, in order."""
    limit = math.log1p(tolerance.relative)
    p_values = [
        min(_p_beyond(e, limit), _p_beyond(_mirrored(e), limit)) if e is not None else 1.0
        for e in estimates
    ]
    threshold = benjamini_hochberg(p_values, ALPHA)
    return [
        _judge(estimate, tolerance, p_value <= threshold)
        for estimate, p_value in zip(estimates, p_values, strict=True)
    ]


def benjamini_hochberg(p_values: Sequence[float], rate: float) -> float:
    """The largest p-value that is still a discovery at this false discovery rate; 0 if none is."""
    found = 0.0
    for rank, p_value in enumerate(sorted(p_values), start=1):
        if p_value <= rate * rank / len(p_values):
            found = p_value
    return found


def _p_beyond(estimate: Estimate, limit: float) -> float:
    """The p-value of "the log ratio is at most `limit`"."""
    if estimate.error == 0:
        return float(estimate.mean <= limit)
    return float(stdtr(estimate.freedom, (limit - estimate.mean) / estimate.error))


def _mirrored(estimate: Estimate) -> Estimate:
    return Estimate(
        -estimate.mean, estimate.error, estimate.freedom, estimate.head_ms, estimate.base_ms
    )


def _judge(estimate: Estimate | None, tolerance: Tolerance, discovered: bool) -> Verdict:
    if estimate is None:
        reason = "too few valid rounds, and no calibration that could stand in"
        return Verdict(word="AMBIGUOUS", reasons=[reason])
    limit = math.log1p(tolerance.relative)
    low, high = estimate.bound(-1), estimate.bound(1)
    reasons: list[str] = []
    word: Word = "AMBIGUOUS"
    if low > limit or high < -limit:
        which = "lower" if low > limit else "upper"
        reasons.append(f"the {which} bound is beyond the tolerance of {tolerance.relative:.1%}")
        # Not from the medians: their difference is not of pairs, and the machine drifts meanwhile.
        if abs(math.expm1(estimate.mean)) * estimate.base_ms <= tolerance.absolute_ms:
            reasons.append(f"but it is a difference of at most {tolerance.absolute_ms * 1e3:g} µs")
            word = "SAME"
        elif not discovered:
            reasons.append("but among so many cells it may be chance (Benjamini-Hochberg)")
        else:
            word = "SLOW" if low > limit else "FAST"
    elif low > -limit and high < limit:
        word = "SAME"
        reasons.append(f"both bounds are within the tolerance of {tolerance.relative:.1%}")
    else:
        reasons.append(f"a bound crosses the tolerance of {tolerance.relative:.1%}")
    return Verdict(
        word=word,
        ratio=math.exp(estimate.mean),
        low=math.exp(low),
        high=math.exp(high),
        detectable=smallest_detectable(tolerance, estimate.error, estimate.freedom),
        reasons=reasons,
    )


def smallest_detectable(tolerance: Tolerance, error: float, freedom: float) -> float:
    """The relative slowdown that is seen with probability POWER at this standard error."""
    quantiles = float(stdtrit(freedom, 1 - ALPHA) + stdtrit(freedom, POWER))
    return math.expm1(math.log1p(tolerance.relative) + quantiles * error)
