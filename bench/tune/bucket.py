"""Measuring one bucket: wrong choices are refused, right ones timed, the fastest taken."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from resblock_bench.bench.errors import first_line
from resblock_bench.kernels.tiers import Choice, Launch, shape
from resblock_bench.kernels.tuned import Entry

from .cases import CallTruth, Case, draw_case, mistake, poisoned, same_bits, truth_of
from .choices import BucketWork, bucket_name, candidates, choice_name
from .gpu import Bench, DeviceLost

# Relative gain of the median below which the rules' choice stays: about what repeats differ by.
LEAST_GAIN = 0.02
# A launch whose programs read what others stored may be wrong only once in a while, so it is
# repeated more often.
REPEATS = 8


class Refusal(NamedTuple):
    """A choice that is not taken, whatever its time. wrong: it ran, and its results are wrong."""

    choice: Choice
    reason: str
    wrong: bool


@dataclass
class BucketOutcome:
    """What came of a bucket. entry None: nothing to write, for `problem` or lack of time.

    tried: choices that were launched, of `planned`.
    """

    work: BucketWork
    entry: Entry | None = None
    rules: Choice | None = None
    problem: str | None = None
    cut_short: bool = False
    planned: int = 0
    tried: int = 0
    refused: list[Refusal] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """Of the entry over the rules, as a share of the rules' time."""
        return 0.0 if self.entry is None else 1 - self.entry.time_us / self.entry.rules_us

    @property
    def rules_are_wrong(self) -> bool:
        return any(refusal.wrong and refusal.choice == self.rules for refusal in self.refused)


def measure(
    bench: Bench,
    work: BucketWork,
    *,
    seed: int,
    known: Choice | None = None,
    expired: Callable[[], bool] = lambda: False,
) -> BucketOutcome:
    """Measure the candidates of a bucket and decide.

    known     a choice from an earlier run, which is measured too
    expired   whether to stop: what is better so far is still taken, the rest is not known

    Raises DeviceLost, naming the launch.
    """
    direction, problem, machine = work.bucket.direction, work.problem, bench.machine
    choices = candidates(direction, problem, machine, known)
    rules = choices[0]
    outcome = BucketOutcome(work, rules=rules, planned=len(choices))
    try:
        case = draw_case(direction, problem, work.dtype, bench.device, seed)
        truth = truth_of(case)
    except (torch.OutOfMemoryError, MemoryError):
        outcome.problem = "the GPU's memory does not hold it"
        return outcome

    times: dict[Choice, float] = {}
    for choice in choices:
        if times and expired():
            outcome.cut_short = True
            break
        outcome.tried += 1
        how = shape(direction, problem, machine, choice)
        with _refusing(outcome, choice):
            _check(bench, how, case, truth)
            times[choice] = bench.time_us(case, how)
        if rules not in times:
            outcome.problem = f"the rules' own launch was refused: {outcome.refused[0].reason}"
            return outcome

    for choice in sorted(times, key=lambda choice: times[choice]):
        if not _beats(times[choice], times[rules]):
            break
        # Of many, the fastest was also the luckiest: it and the rules are timed once more, one
        # after the other.
        again: list[float] = []
        for each in (rules, choice):
            with _refusing(outcome, each):
                again.append(bench.time_us(case, shape(direction, problem, machine, each)))
        if len(again) < 2:
            continue
        rules_us, best_us = again
        if _beats(best_us, rules_us):
            outcome.entry = _entry(work, choice, best_us, rules_us)
            return outcome
        break
    if not outcome.cut_short:
        outcome.entry = _entry(work, rules, times[rules], times[rules])
    return outcome


def _entry(work: BucketWork, choice: Choice, time_us: float, rules_us: float) -> Entry:
    rounded = round(time_us, 3), round(rules_us, 3)
    how = choice._asdict()
    return Entry(bucket=work.bucket, time_us=rounded[0], rules_us=rounded[1], **how)


def _beats(time_us: float, rules_us: float) -> bool:
    return time_us <= (1 - LEAST_GAIN) * rules_us


class _WrongResult(Exception):
    """What is wrong with the results of a launch."""


@contextlib.contextmanager
def _refusing(outcome: BucketOutcome, choice: Choice) -> Iterator[None]:
    """Refuse the choice for what its launch raises, but name it where the device is lost."""
    try:
        yield
    except DeviceLost as error:
        name = f"{bucket_name(outcome.work.bucket)}: {choice_name(choice)}"
        raise DeviceLost(f"{name} {error}") from error
    except _WrongResult as error:
        outcome.refused.append(Refusal(choice, str(error), wrong=True))
    except Exception as error:
        outcome.refused.append(Refusal(choice, first_line(error), wrong=False))


def _check(bench: Bench, how: Launch, case: Case, truth: CallTruth) -> None:
    """Run a launch, compare it with the truth, and repeat it; raises _WrongResult.

    Programs of a divided unit exchange its sums; the backward's last fold those of all samples.
    """
    exchanging = how.split or case.saved is not None
    with poisoned():
        results = bench.run(case, how)
    reason = mistake(results, truth)
    if reason is not None:
        raise _WrongResult(reason)
    for _ in range(REPEATS if exchanging else 1):
        with poisoned():
            again = bench.run(case, how)
        for name, first in results.items():
            if not same_bits(first, again[name]):
                raise _WrongResult(f"{name} differs from run to run")
