"""A bench for tuning without a GPU: launches give what eager PyTorch does, or are interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.tune import bucket as tune_measure
from resblock_bench.bench.tune import cases as tune_cases
from resblock_bench.bench.tune import choices as tune_choices
from resblock_bench.bench.tune.bucket import BucketOutcome
from resblock_bench.bench.tune.cases import Case
from resblock_bench.bench.tune.choices import BucketWork
from resblock_bench.kernels import tiers, tuned
from resblock_bench.kernels.tiers import Choice, Direction, Launch, Machine, Problem

CPU = torch.device("cpu")
H100 = Machine(sms=132, l2_bytes=50 * 2**20)
# Large enough for every tier, small enough for the interpreter.
SMALL = Machine(sms=6, l2_bytes=2**20)
PROBLEM = Problem(N=1, C=6, HW=300, G=2, channels_last=False, element_size=4)
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class Scripted:
    """A bench whose launches give what eager PyTorch gives, in the times of a script.

    Each launch passes through `around`, which may change its results or raise.
    """

    name, arch, device = "a scripted GPU", "sm_00", CPU

    def __init__(
        self,
        time_us: Callable[[Launch], float] = lambda how: 10.0,
        around: Callable[[Case, Launch, Tensors], Tensors] = lambda case, how, out: out,
        machine: Machine = SMALL,
    ) -> None:
        self.machine = machine
        self.script, self.around = time_us, around
        self.ran: list[tuple[Case, Launch]] = []
        self.timed: list[Launch] = []
        self.gave_up = False

    def results(self, case: Case, how: Launch) -> Tensors:
        return tune_cases.reference(case)

    def run(self, case: Case, how: Launch) -> Tensors:
        self.ran.append((case, how))
        return self.around(case, how, self.results(case, how))

    def time_us(self, case: Case, how: Launch) -> float:
        self.timed.append(how)
        return self.script(how)

    def give_up(self, code: int) -> int:
        self.gave_up = True
        return code


class Interpreted(Scripted):
    """The real kernels."""

    def results(self, case: Case, how: Launch) -> Tensors:
        return tune_cases.launched(case, how)


def work(direction: Direction = "forward", problem: Problem = PROBLEM) -> BucketWork:
    dtype = {2: torch.bfloat16, 4: torch.float32}[problem.element_size]
    return BucketWork(tuned.bucket_of(direction, problem), problem, dtype, 1)


def measured(bench: Scripted, item: BucketWork | None = None, **options: Any) -> BucketOutcome:
    return tune_measure.measure(bench, item or work(), seed=0, **options)


def choices(direction: Direction = "forward", problem: Problem = PROBLEM) -> list[Choice]:
    return tune_choices.candidates(direction, problem, SMALL)


def shaped(choice: Choice, direction: Direction = "forward", problem: Problem = PROBLEM) -> Launch:
    return tiers.shape(direction, problem, SMALL, choice)
