"""Tuning without a GPU: a bench that answers from the formula or the interpreter, and a script."""

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from support import oracle
from torch import Tensor

from resblock_bench.bench.checkout import source_state
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import models
from resblock_bench.bench.measure import operator
from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.records import Cell
from resblock_bench.bench.runs.table import WIDTH
from resblock_bench.bench.tune import bucket as tune_measure
from resblock_bench.bench.tune import cases as tune_cases
from resblock_bench.bench.tune import choices as tune_choices
from resblock_bench.bench.tune import gpu as tune_gpu
from resblock_bench.bench.tune import report as tune_report
from resblock_bench.bench.tune import tune
from resblock_bench.bench.tune.bucket import BucketOutcome
from resblock_bench.bench.tune.cases import Case
from resblock_bench.bench.tune.choices import BucketWork
from resblock_bench.bench.tune.gpu import DeviceLost
from resblock_bench.bench.tune.tune import TuneRequest
from resblock_bench.kernels import dispatch, launch, tiers, tuned
from resblock_bench.kernels.tiers import Choice, Direction, Launch, Machine, Problem
from resblock_bench.kernels.tuned import Bucket

CPU = torch.device("cpu")
SHAPES = Path(__file__).parents[2] / "data" / "resblock_shapes.csv"
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


# Candidates


def published_sites() -> set[tuple[int, int]]:
    """(C, HW) of every norm of every published block."""
    sites = set()
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            factor = {"up": 4, "down": 0.25, "none": 1}[row["updown"]]
            positions = int(row["h"]) * int(row["w"])
            sites.add((int(row["c_in"]), positions))
            sites.add((int(row["c_out"]), int(positions * factor)))
    return sites


def published_problems() -> Iterator[tuple[Direction, Problem]]:
    for (C, HW), N, channels_last, size, direction in itertools.product(
        sorted(published_sites()), (1, 64), (False, True), (2, 4), DIRECTIONS
    ):
        yield direction, Problem(N, C, HW, 32, channels_last, size)


def work_of(how: Launch, HW: int) -> tuple[object, ...]:
    """What distinguishes a launch from another: C and D differ in their sizes alone."""
    tier = "C" if how.split else how.tier
    return tier, how.slab, how.block_c, how.block_hw, min(how.chunk, HW), how.lag, how.num_warps


def test_every_published_norm_has_candidates_the_rules_first() -> None:
    for direction, problem in published_problems():
        found = tune_choices.candidates(direction, problem, H100)
        launches = [tiers.shape(direction, problem, H100, choice) for choice in found]
        rules = tiers.plan_launch(direction, problem, H100)
        assert launches[0] == rules._replace(reason=launches[0].reason)
        assert len(found) <= 30
        assert all(how.num_warps in (1, 2, 4, 8, 16) for how in launches)
        assert all(not how.split or how.parts > 1 for how in launches[1:])
        assert len({work_of(how, problem.HW) for how in launches}) == len(found)


def test_every_candidate_can_be_written_to_a_table_and_read() -> None:
    for direction, problem in published_problems():
        bucket = tuned.bucket_of(direction, problem)
        for choice in tune_choices.candidates(direction, problem, H100):
            fields = {"bucket": bucket, "time_us": 1.0, "rules_us": 1.0, **choice._asdict()}
            assert msgspec.convert(fields, tuned.Entry).choice == choice


def test_tiers_are_tried_where_they_make_sense() -> None:
    def tried(N: int, C: int, HW: int, channels_last: bool = False) -> str:
        problem = Problem(N, C, HW, 32, channels_last, 2)
        found = tune_choices.candidates("forward", problem, H100)
        return "".join(sorted({choice.tier for choice in found}))

    assert tried(64, 256, 64) == "A"  # one tile is the whole unit, and B what A is, read twice
    assert tried(64, 256, 1024) == "AB"
    assert tried(1, 256, 1024) == "AC"  # 32 units leave most of the GPU idle
    assert tried(8, 256, 65536) == "BC"  # D would launch as C does
    assert tried(8, 256, 65536, channels_last=True) == "CD"  # C in smaller parts
    assert tried(1, 256, 2048 * 2048) == "D"  # no group fits in L2
    # Nor a sample in 32 bits, as B has it.
    assert tried(8, 256, 2896 * 2897, channels_last=True) == "D"


def test_the_shapes_of_a_divided_unit() -> None:
    problem = Problem(1, 256, 2048 * 2048, 32, False, 2)
    rules, *others = tune_choices.candidates("forward", problem, H100)
    assert rules == Choice("D", 4096, 8, 4, 4)
    assert set(others) == {
        *(Choice("D", *shape) for shape in ((2048, 4, 8, 8), (2048, 2, 8, 8), (4096, 4, 4, 4))),
        *(Choice("D", *shape) for shape in ((8192, 16, 2, 2), (8192, 8, 2, 2))),
        *(rules._replace(waves=w, tiles=t) for w in (2, 4, 8) for t in (1, 4, 16)),
    } - {rules}
    # None of the four axes is lost on the way to the launch.
    launches = [tiers.shape("forward", problem, H100, choice) for choice in (rules, *others)]
    assert {how.block_hw for how in launches} == {2048, 4096, 8192}
    assert {how.num_warps for how in launches if how.block_hw == 4096} == {4, 8}
    assert {how.tiles for how in launches if how.block_hw == 4096} == {1, 4, 16}
    assert len({how.lag for how in launches if how.tiles == 4 and how.num_warps == 8}) == 3
    # Where a part cannot be longer than a channel, more tiles a part are none.
    problem = Problem(8, 256, 4096, 32, False, 2)
    assert tiers.plan_launch("forward", problem, H100, "C").splits == 1
    divided = [c for c in tune_choices.candidates("forward", problem, H100) if c.tier in "CD"]
    assert len({(choice.tile, choice.warps, choice.waves) for choice in divided}) == len(divided)


def test_an_earlier_choice_comes_after_the_rules() -> None:
    known = Choice("B", 16, 1)
    assert tune_choices.candidates("forward", PROBLEM, SMALL, known)[:2] == [choices()[0], known]
    same_as_rules = choices()[0]._replace(waves=7)  # which tier A does not read
    assert tune_choices.candidates("forward", PROBLEM, SMALL, same_as_rules) == choices()
    too_large = Choice("A", 4096, 4)
    large = Problem(8, 256, 65536, 32, False, 2)
    assert too_large not in tune_choices.candidates("forward", large, H100, too_large)


# Buckets


def test_the_buckets_of_a_model_are_its_norms() -> None:
    works = tune_choices.buckets(tune_choices.select(["model=adm-imagenet64-cond", "batch=8"]))
    found = {(w.bucket.direction, w.problem.C, w.problem.HW) for w in works}
    with SHAPES.open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "adm-imagenet64-cond"]
    wanted = set()
    for row in rows:
        size = int(row["h"]) * int(row["w"])
        after = {"up": size * 4, "down": size // 4, "none": size}[row["updown"]]
        for direction in DIRECTIONS:
            wanted |= {(direction, int(row["c_in"]), size), (direction, int(row["c_out"]), after)}
    assert found == wanted and len(works) == len(wanted)
    assert {w.dtype for w in works} == {torch.bfloat16}
    assert all(w.bucket.groups == 256 and w.bucket.layout == "nchw" for w in works)
    weights = [w.weight for w in works]
    assert weights == sorted(weights, reverse=True)


def test_a_bucket_weighs_what_all_its_calls_move() -> None:
    arguments = ["channels=64", "resolution=8", "batch=5,8", "dtype=fp32"]
    works = tune_choices.buckets(tune_choices.select([*arguments, "impl=reference,fused"]))
    assert [w.bucket.direction for w in works] == ["backward", "forward"]
    # Two norms at each of two batches: 5·32 and 8·32 groups are both up to 256.
    numbers = 2 * (5 + 8) * 64 * 64
    assert [w.weight for w in works] == [3 * 4 * numbers, 2 * 4 * numbers]
    assert all(w.problem == Problem(8, 64, 64, 32, False, 4) for w in works)
    inference = tune_choices.buckets(tune_choices.select([*arguments, "mode=inference"]))
    assert [w.bucket.direction for w in inference] == ["forward"]


@pytest.mark.parametrize(
    ("changes", "second"),
    [
        ({}, (48, 64)),
        ({"updown": "up"}, (48, 256)),
        ({"updown": "down"}, (48, 16)),
        ({"dims": 3}, (48, 512)),
        ({"dims": 3, "updown": "up"}, (48, 2048)),  # never resampled is the outermost size
    ],
    ids=str,
)
def test_the_second_norm_is_over_what_the_first_convolution_returns(
    make_cell: Callable[..., Cell], changes: dict[str, Any], second: tuple[int, int]
) -> None:
    cell = make_cell(resolution=8, channels=32, out_channels=48, batch=3, **changes)
    assert tune_choices.norms(cell) == tuple(
        Problem(3, C, HW, 32, False, 4) for C, HW in ((32, 8**cell.dims), second)
    )


def test_a_single_position_is_nobodys_layout() -> None:
    one = ["channels=64", "batch=1", "layout=nhwc"]
    assert tune_choices.buckets(tune_choices.select([*one, "resolution=1"])) == []
    (forward,) = tune_choices.buckets(tune_choices.select([*one, "resolution=2", "mode=forward"]))
    assert forward.bucket == Bucket("forward", "nhwc", 2, 2, 4, 32)
    (cell,) = tune_choices.select([*one, "resolution=1", "mode=forward"])
    assert not tune_choices.norms(cell.cell)[0].channels_last


def test_what_is_measured_by_default() -> None:
    cells = [item.cell for item in tune_choices.select([])]
    assert {cell.model for cell in cells} == set(models())
    assert {(cell.dtype, cell.batch) for cell in cells} == {("bf16", 8), ("bf16", 64)}
    free = [item.cell for item in tune_choices.select(["channels=64", "dtype=fp32"])]
    assert {(cell.model, cell.channels, cell.dtype) for cell in free} == {(None, 64, "fp32")}


# One call


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_reference_is_that_of_the_tests(
    monkeypatch: pytest.MonkeyPatch, direction: Direction, channels_last: bool
) -> None:
    monkeypatch.setattr(operator, "PART_ELEMENTS", 2 * 6 * 300)  # 2 samples, 2 and 1
    problem = PROBLEM._replace(N=5, channels_last=channels_last)
    case = tune_cases.draw_case(direction, problem, torch.float32, CPU, 0)
    x, dy, m, _ = case.inputs
    assert dispatch.problem_of(x, 2) == problem
    call = oracle.Problem(x, dy, 2, m.weight, m.bias, m.scale, m.shift, m.pre_shift)
    wanted = oracle.gradients(oracle.eager, call.to(torch.float64))
    found = tune_cases.reference(case, torch.float64)
    if direction == "forward":
        torch.testing.assert_close(found["y"], wanted["y"])
        h = (x + m.pre_shift.reshape(5, 6, *(1,) * (x.dim() - 2))).double()
        groups = h.reshape(5, 2, -1)
        torch.testing.assert_close(found["mean"], groups.mean(2))
        torch.testing.assert_close(found["rstd"], 1 / (groups.var(2, correction=0) + 1e-5).sqrt())
    else:
        assert set(found) == {"dx", "dweight", "dbias", "dscale", "dshift", "dpre_shift"}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name[1:]])
    own = tune_cases.reference(case)
    assert {t.dtype for t in own.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("channels_last", "size"), [(False, 4), (True, 2)], ids=["nchw fp32", "nhwc bf16"]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_kernels_are_found_right_in_every_tier(
    monkeypatch: pytest.MonkeyPatch, direction: Direction, channels_last: bool, size: int
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(tune_measure, "REPEATS", 1)  # the interpreter has no races
    problem = PROBLEM._replace(channels_last=channels_last, element_size=size)
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]
    case = tune_cases.draw_case(direction, problem, dtype, CPU, 0)
    truth = tune_cases.truth_of(case)
    for choice in (*(Choice(tier, 128, 1) for tier in "ABC"), Choice("D", 128, 1, 1, 2)):
        how = shaped(choice, direction, problem)
        assert not how.split or channels_last or how.splits > 1
        tune_measure._check(Interpreted(), how, case, truth)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_channel_a_group(monkeypatch: pytest.MonkeyPatch, direction: Direction) -> None:
    """The gradient of what is added before the norm vanishes, and must not fail every launch."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tune_measure, "REPEATS", 1)
    problem = Problem(2, 4, 40, 4, False, 4)
    case = tune_cases.draw_case(direction, problem, torch.float32, CPU, 0)
    assert case.inputs.modulation.pre_shift is None
    how = tiers.plan_launch(direction, problem, SMALL)
    tune_measure._check(Interpreted(), how, case, tune_cases.truth_of(case))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_element_that_no_program_writes_is_noticed(direction: Direction) -> None:
    """A real launch of the real kernels, over fewer positions than there are."""
    pytest.importorskip("triton")
    case = tune_cases.draw_case(direction, PROBLEM, torch.float32, CPU, 0)
    how = shaped(Choice("C", 128, 1), direction)
    assert how.splits > 1
    damaged = how._replace(splits=how.splits - 1)
    damaged = damaged._replace(lag=damaged.parts)  # which must not exceed all parts
    with pytest.raises(tune_measure._WrongResult, match="NaN or were never written"):
        tune_measure._check(Interpreted(), damaged, case, tune_cases.truth_of(case))


@pytest.mark.parametrize("size", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("y", lambda t: t * 1.05, "y has a relative error"),
        ("mean", lambda t: t + 0.1, "mean has a relative error"),
        ("rstd", lambda t: t.flip(1), "rstd has a relative error"),
        ("y", lambda t: t[..., :1], "y has a relative error of inf"),
        ("y", lambda t: t.index_fill(2, torch.tensor([7]), torch.nan), "NaN"),
    ],
)
def test_a_wrong_result_is_refused(
    size: int, name: str, damage: Callable[[Tensor], Tensor], reason: str
) -> None:
    item = work(problem=PROBLEM._replace(element_size=size))
    bench = Scripted(around=lambda case, how, out: out | {name: damage(out[name])})
    outcome = measured(bench, item)
    assert outcome.entry is None and outcome.rules_are_wrong
    assert reason in outcome.refused[0].reason and outcome.refused[0].wrong
    assert bench.timed == []


@pytest.mark.parametrize("name", ["dx", "dweight", "dbias", "dscale", "dshift", "dpre_shift"])
def test_every_gradient_is_looked_at(name: str) -> None:
    bench = Scripted(around=lambda case, how, out: out | {name: out[name] * 1.01})
    (refusal,) = measured(bench, work("backward")).refused
    assert refusal.wrong and refusal.reason.startswith(f"{name} has a relative error")
    bench = Scripted(around=lambda case, how, out: {k: v for k, v in out.items() if k != name})
    (refusal,) = measured(bench, work("backward")).refused
    assert refusal.reason.startswith(f"{name} has a relative error of inf")


def test_one_wrong_element_of_many_is_noticed() -> None:
    """In bf16 it does not show in the norm."""
    problem = Problem(8, 64, 1024, 4, False, 2)
    case = tune_cases.draw_case("forward", problem, torch.bfloat16, CPU, 0)
    truth = tune_cases.truth_of(case)
    results = tune_cases.reference(case)
    assert tune_cases.mistake(results, truth) is None
    results["y"][3, 5, 17] += 2
    reason = tune_cases.mistake(results, truth)
    assert reason is not None and reason.startswith("an element of y is off by")


def test_without_a_limit_nothing_is_right() -> None:
    nan = tune_cases.Error(float("nan"), float("nan"))
    exact = {"t": torch.ones(2, dtype=torch.float64)}
    assert (
        tune_cases.mistake({"t": torch.ones(2)}, tune_cases.CallTruth(exact, {"t": nan}))
        is not None
    )


def test_errors_are_relative_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_cases, "PART_ELEMENTS", 2)
    truth = {"t": torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0], dtype=torch.float64)}
    (error,) = tune_cases.errors({"t": torch.tensor([3.0, 3.0, 0.0, 0.0, 0.0])}, truth).values()
    assert error.norm == pytest.approx(1.0)
    assert error.element == pytest.approx(4 / (25 / 5) ** 0.5)


def test_limits_follow_from_the_error_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, eager = torch.tensor([3.0, -4.0], dtype=torch.float64), torch.tensor([3.0, -3.0])
    monkeypatch.setattr(
        tune_cases, "reference", lambda case, dtype=None: {"t": exact if dtype else eager}
    )
    limit = tune_cases.truth_of(None).limits["t"]
    eps, rms = 2**-23, 12.5**0.5
    assert limit.norm == pytest.approx(2 * 2 / 5, rel=1e-12)
    assert limit.element == pytest.approx(4 / rms, rel=1e-12)
    eager = torch.tensor([3.0, -4.0])
    floor = tune_cases.truth_of(None).limits["t"]
    assert floor.norm == pytest.approx(2 * 4 * eps, rel=1e-12)
    assert floor.element == pytest.approx(4 * eps * 4 / rms)


def test_a_launch_must_repeat_to_the_bit() -> None:
    def nudge(case: Case, how: Launch, out: Tensors) -> Tensors:
        return out | {"y": out["y"] * (1 + 2**-23 * (len(bench.ran) > 1))}

    bench = Scripted(around=nudge)
    outcome = measured(bench)
    assert outcome.refused[0] == tune_measure.Refusal(
        choices()[0], "y differs from run to run", True
    )


def test_signed_zeros_are_different_bits() -> None:
    assert tune_cases.same_bits(torch.zeros(2), torch.zeros(2))
    assert not tune_cases.same_bits(torch.zeros(2), -torch.zeros(2))


@pytest.mark.parametrize("before", [(True, False), (True, True), (False, False)])
def test_empty_tensors_are_poisoned_while_a_launch_is_checked(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with pytest.raises(ZeroDivisionError), tune_cases.poisoned():
            assert torch.empty(1).isnan().all()
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled() == before[0]
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before[1]
    finally:
        torch.use_deterministic_algorithms(False)


# Selection. The problem has units for half of the machine: all tiers are tried.

ALL_TIERS = Problem(N=1, C=6, HW=5000, G=3, channels_last=False, element_size=4)


def all_tiers() -> BucketWork:
    return work(problem=ALL_TIERS)


def test_the_fastest_is_taken() -> None:
    rules, *others = choices(problem=ALL_TIERS)
    assert {choice.tier for choice in others} == {"A", "B", "C"}
    for best in (others[0], others[-1]):
        how = shaped(best, problem=ALL_TIERS)
        bench = Scripted(lambda seen, how=how: 7.5 if seen == how else 10.0)
        outcome = measured(bench, all_tiers())
        assert outcome.entry is not None and outcome.entry.choice == best
        assert (outcome.entry.time_us, outcome.entry.rules_us) == (7.5, 10.0)
        assert outcome.entry.bucket == all_tiers().bucket
        assert outcome.gain == pytest.approx(0.25)
        assert outcome.tried == outcome.planned == len(others) + 1
        assert bench.timed[-2:] == [shaped(rules, problem=ALL_TIERS), how]


@pytest.mark.parametrize(("time_us", "taken"), [(9.81, False), (9.79, True)])
def test_less_than_the_noise_is_no_gain(time_us: float, taken: bool) -> None:
    rules, best, *_ = choices()
    bench = Scripted(lambda how: time_us if how == shaped(best) else 10.0)
    outcome = measured(bench)
    assert outcome.entry is not None
    assert outcome.entry.choice == (best if taken else rules)
    assert outcome.entry.rules_us == 10.0 and (outcome.gain > 0) == taken


def test_a_lucky_time_is_no_gain() -> None:
    rules, best, *_ = choices()
    times = iter([5.0, 10.0])
    bench = Scripted(lambda how: next(times) if how == shaped(best) else 10.0)
    outcome = measured(bench)
    assert outcome.entry is not None and outcome.entry.choice == rules
    assert outcome.entry.time_us == outcome.entry.rules_us == 10.0


def test_a_choice_that_fails_when_it_is_timed_once_more_is_refused() -> None:
    _, best, second, *_ = choices()

    def time_us(how: Launch) -> float:
        if bench.timed.count(shaped(best)) == 2 and how == shaped(best):
            raise RuntimeError("not again")
        return {shaped(best): 5.0, shaped(second): 6.0}.get(how, 10.0)

    bench = Scripted(time_us)
    outcome = measured(bench)
    assert outcome.entry is not None and outcome.entry.choice == second
    assert outcome.refused == [tune_measure.Refusal(best, "RuntimeError: not again", False)]


def test_a_refused_launch_is_not_taken_however_fast() -> None:
    rules, wrong, failing, slower, *_ = choices(problem=ALL_TIERS)

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        if how == shaped(failing, problem=ALL_TIERS):
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        return out | {"y": out["y"] * (1.01 if how == shaped(wrong, problem=ALL_TIERS) else 1.0)}

    def time_us(how: Launch) -> float:
        if how == shaped(slower, problem=ALL_TIERS):
            raise RuntimeError("fails once it is timed")
        return 10.0 if how == shaped(rules, problem=ALL_TIERS) else 9.0

    outcome = measured(Scripted(time_us, around), all_tiers())
    assert [(r.choice, r.wrong) for r in outcome.refused] == [
        (wrong, True),
        (failing, False),
        (slower, False),
    ]
    assert outcome.refused[1].reason == "RuntimeError: out of resource: shared memory"
    assert outcome.entry is not None and outcome.entry.choice not in (rules, wrong, failing, slower)
    assert outcome.problem is None and not outcome.rules_are_wrong


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_launches_whose_programs_exchange_sums_are_repeated_more_often(
    direction: Direction,
) -> None:
    """They may be wrong only once in a while. The backward's last programs fold in any tier."""
    bench = Scripted()
    measured(bench, work(direction, ALL_TIERS))
    runs = Counter(how for _, how in bench.ran)
    assert {how.tier for how in runs} >= {"B", "C"}
    for how, count in runs.items():
        assert count == (9 if how.split or direction == "backward" else 2), how

    def err_once(case: Case, how: Launch, out: Tensors) -> Tensors:
        name = next(iter(out))
        late = sum(how == seen for _, seen in bench.ran) == 9
        return out | {name: out[name] * (1 + 2**-23)} if late else out

    bench = Scripted(around=err_once)
    outcome = measured(bench, work(direction, ALL_TIERS))
    assert outcome.rules_are_wrong and "differs from run to run" in outcome.refused[0].reason


def test_what_memory_does_not_hold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune_measure, "draw_case", exhaust)
    outcome = measured(Scripted())
    assert outcome.entry is None and outcome.problem == "the GPU's memory does not hold it"


def test_a_lost_device_ends_it_and_names_the_launch() -> None:
    def time_us(how: Launch) -> float:
        if len(bench.timed) == 2:
            raise DeviceLost("did not end within 20s")
        return 10.0

    bench = Scripted(time_us)
    name = tune_choices.choice_name(choices()[1])
    with pytest.raises(DeviceLost, match=f"forward nchw 32-bit 3×300 ×2: {name} did not end"):
        measured(bench)


# The run


Tune = Callable[..., SimpleNamespace]
TINY = ["channels=64", "resolution=4", "batch=1", "dtype=fp32"]


@pytest.fixture
def run_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tune:
    """Tune a tiny selection with a bench into a table in tmp_path: code, output, path, entries."""

    def run(bench: Scripted, *arguments: str, clock: Any = None, **fields: Any) -> SimpleNamespace:
        path = fields.pop("output", tmp_path / "table.json")
        request = TuneRequest(tune_choices.select(list(arguments or TINY)), output=path, **fields)
        options = {} if clock is None else {"clock": clock}
        code = tune.tune(request, Console(width=WIDTH), bench, **options)
        out = capsys.readouterr().out
        entries = tuned.read(path).entries if path is not None and path.exists() else None
        return SimpleNamespace(code=code, out=out, path=path, entries=entries)

    return run


def halved(how: Launch) -> float:
    """Every launch of four warps takes half as long."""
    return 5.0 if how.num_warps == 4 else 10.0


def test_a_run_from_end_to_end_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line's arguments to the launch that a call takes."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(dispatch, "_machine", lambda device: (SMALL, "sm_00"))
    tuned.forget()
    x = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    assert dispatch.launch_for("forward", x, 32).num_warps == 2
    monkeypatch.setattr(tune_measure, "REPEATS", 1)
    bench = Interpreted(halved)
    arguments = ["channels=64", "resolution=8", "batch=1", "dtype=fp32", "layout=nhwc"]
    request = TuneRequest(tune_choices.select(arguments), budget_s=180.0)
    assert tune.tune(request, Console(width=WIDTH), bench) == 0
    path = tmp_path / "tables" / "sm_00.json"
    table = tuned.read(path)
    assert table.arch == "sm_00" and table.machine["gpu"] == "a scripted GPU"
    assert set(table.machine) == {"gpu", "driver", "torch", "triton", "cuda"}
    commit, _ = source_state(Path(tune.__file__).parent)
    assert table.commit.removesuffix("-dirty") == (commit or "unknown")
    assert table.measured_at.endswith("+00:00")
    assert [entry.bucket for entry in table.entries] == [
        Bucket(direction, "nhwc", 4, 2, 64, 32) for direction in ("backward", "forward")
    ]
    # The table is in force at once.
    taken = dispatch.launch_for("forward", x, 32)
    assert taken.reason.startswith("measured on sm_00") and taken.num_warps == 4
    out = capsys.readouterr().out
    assert f"2 buckets of calls on a scripted GPU (sm_00) into {path}" in out
    assert "[2/2] forward nhwc 32-bit 2×64 ×32: A w4, 5.0 µs; the rules' takes 10.0 µs" in out
    assert {how.tier for _, how in bench.ran} == {"A", "C"} and "refused:" not in out
    assert "2 of 2 buckets: the rules are as good in 0 and beaten in 2, by 50% to 50%." in out
    tuned.forget()


def test_a_table_has_a_line_for_each_bucket(run_tune: Tune) -> None:
    done = run_tune(Scripted(halved), *TINY, "layout=nchw,nhwc")
    assert done.code == 0
    lines = done.path.read_text().splitlines()
    assert sum('"bucket"' in line for line in lines) == len(done.entries) == 4
    assert json.loads(done.path.read_text())["arch"] == "sm_00"
    assert done.path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in done.path.parent.iterdir()] == ["table.json"]


def test_a_wrong_rule_ends_with_5_and_writes_nothing_for_its_bucket(run_tune: Tune) -> None:
    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        return out if case.saved is None else out | {"dx": out["dx"] * 1.01}

    done = run_tune(Scripted(around=around))
    assert done.code == 5
    assert [entry.bucket.direction for entry in done.entries] == ["forward"]
    assert "WRONG: backward nchw 32-bit 2×16 ×32: A w1 (the rules'): dx has a relative" in done.out
    assert "the rules' is WRONG" in done.out


def test_another_wrong_launch_is_said_and_ends_with_0(run_tune: Tune) -> None:
    arguments = ["channels=64", "resolution=16", "batch=1", "layout=nhwc", "mode=forward"]

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        return out | {"y": out["y"] * (1.05 if how.tier == "A" else 1)}

    done = run_tune(Scripted(around=around), *arguments)
    assert done.code == 0 and len(done.entries) == 1
    wrong = [line for line in done.out.splitlines() if line.startswith("WRONG: forward nhwc")]
    assert [line.split(": ")[2] for line in wrong] == ["A w16", "A w8", "A w4"]
    assert all(line.split(": ")[3].startswith("y has a relative error") for line in wrong)


def test_a_rule_that_does_not_launch_ends_with_3(run_tune: Tune) -> None:
    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        if case.saved is None:
            raise RuntimeError("[out of resources]")
        return out

    done = run_tune(Scripted(around=around))
    assert done.code == 3
    assert [entry.bucket.direction for entry in done.entries] == ["backward"]
    reason = "the rules' own launch was refused: RuntimeError: [out of resources]"
    assert f"not measured: forward nchw 32-bit 2×16 ×32: {reason}" in done.out
    assert "refused: 1 launch: RuntimeError: [out of resources]" in done.out


def test_what_memory_does_not_hold_is_a_result(
    run_tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_case = tune_cases.draw_case

    def draw(direction: Direction, *rest: Any) -> Case:
        if direction == "backward" or everything:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_case(direction, *rest)

    monkeypatch.setattr(tune_measure, "draw_case", draw)
    everything = False
    done = run_tune(Scripted())
    assert done.code == 0 and len(done.entries) == 1
    assert "not measured: backward" in done.out and "memory does not hold it" in done.out
    everything = True
    assert run_tune(Scripted()).code == 3


def ticking(bench: Scripted) -> Callable[[], float]:
    """A clock on which every measured time costs a second."""
    return lambda: float(len(bench.timed))


THREE = ["channels=64", "resolution=4,8,16", "batch=1", "dtype=fp32", "mode=forward", "layout=nhwc"]


def test_a_spent_budget_ends_between_two_buckets(run_tune: Tune) -> None:
    first, second, _ = tune_choices.buckets(tune_choices.select(THREE))
    bench = Scripted()
    cost = len(choices(problem=first.problem))
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=cost)
    assert done.code == 3 and len(bench.timed) == cost
    assert [entry.bucket for entry in done.entries] == [first.bucket]
    line = f"stopped, since the time budget is spent: {done.path} has what was measured"
    assert f"{line}, 2 buckets are left" in done.out
    assert "1 of 3 buckets: the rules are as good in 1." in done.out

    bench = Scripted()
    cost += len(choices(problem=second.problem))
    os.remove(done.path)
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=cost)
    assert [entry.bucket for entry in done.entries] == sorted([first.bucket, second.bucket])


@pytest.mark.parametrize("better", [True, False])
def test_a_bucket_cut_short_keeps_what_is_better_and_leaves_the_rest(
    run_tune: Tune, better: bool
) -> None:
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    second = choices(problem=first.problem)[1]
    fast = shaped(second, problem=first.problem)
    bench = Scripted(lambda how: 5.0 if better and how == fast else 10.0)
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=2)
    assert done.code == 3 and "3 buckets are left" in done.out
    if better:
        assert [entry.choice for entry in done.entries] == [second]
    else:
        assert done.entries is None and "out of time; 2 of" in done.out


def test_a_whole_run_within_its_budget_ends_with_0(run_tune: Tune) -> None:
    bench = Scripted()
    done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=1000)
    assert done.code == 0 and len(done.entries) == 3
    assert "left" not in done.out.splitlines()[-1]


def test_runs_add_up(run_tune: Tune) -> None:
    """Buckets without an entry come first, and those that are not measured again stay."""
    works = tune_choices.buckets(tune_choices.select(THREE))
    seen = []
    for work_ in [*works, works[0]]:
        bench = Scripted()
        budget_s = len(choices(problem=work_.problem))
        done = run_tune(bench, *THREE, clock=ticking(bench), budget_s=budget_s)
        calls = [dispatch.problem_of(case.inputs.x, 32) for case, _ in bench.ran]
        assert set(calls) == {work_.problem}
        seen.append(len(done.entries))
    assert seen == [1, 2, 3, 3]


def test_an_entry_is_replaced_once_it_is_measured_again(run_tune: Tune) -> None:
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    best = choices(problem=first.problem)[1]
    fast = shaped(best, problem=first.problem)
    done = run_tune(Scripted(lambda how: 5.0 if how == fast else 10.0), *THREE)
    assert {e.bucket: e.choice for e in done.entries}[first.bucket] == best
    one = [*THREE[:1], "resolution=16", *THREE[2:]]
    done = run_tune(Scripted(), *one)
    assert len(done.entries) == 3
    assert {e.bucket: e.choice for e in done.entries}[first.bucket] != best


def test_an_entry_that_is_refused_goes(run_tune: Tune) -> None:
    """Here the rules fail too, so that nothing replaces it."""
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    run_tune(Scripted(), *THREE)  # the rules', by choice

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        raise RuntimeError("the driver is another one")

    done = run_tune(Scripted(around=around), *THREE[:1], "resolution=16", *THREE[2:])
    assert done.code == 3
    assert first.bucket not in {entry.bucket for entry in done.entries}
    assert len(done.entries) == 2


def test_an_interrupt_keeps_what_was_measured(run_tune: Tune) -> None:
    first = tune_choices.buckets(tune_choices.select(THREE))[0]
    count = len(choices(problem=first.problem))

    def time_us(how: Launch) -> float:
        if len(bench.timed) == count + 1:
            raise KeyboardInterrupt
        return 10.0

    bench = Scripted(time_us)
    done = run_tune(bench, *THREE)
    assert done.code == 3
    assert [entry.bucket for entry in done.entries] == [first.bucket]
    assert f"interrupted: {done.path} has what was measured, 2 buckets are left" in done.out


def test_a_hanging_launch_ends_a_run_and_keeps_what_was_measured(run_tune: Tune) -> None:
    first, second, _ = tune_choices.buckets(tune_choices.select(THREE))

    def around(case: Case, how: Launch, out: Tensors) -> Tensors:
        if case.inputs.x[0, 0].numel() == second.problem.HW:
            raise DeviceLost("did not end within 20s")
        return out

    bench = Scripted(around=around)
    done = run_tune(bench, *THREE)
    assert done.code == 3 and bench.gave_up
    assert [entry.bucket for entry in done.entries] == [first.bucket]
    rules = tune_choices.choice_name(choices(problem=second.problem)[0])
    launch = f"{tune_choices.bucket_name(second.bucket)}: {rules}"
    assert f"stopped: {launch} did not end within 20s, and the GPU runs nothing more" in done.out
    assert "Please report this launch. To measure the rest, select blocks (-a)" in done.out


def test_a_disk_that_fills_up_leaves_the_table_as_it_was(
    run_tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_tune(Scripted(), *TINY).path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    done = run_tune(Scripted(), *TINY)
    assert done.code == 3
    assert "stopped, since" in done.out and "(No space left on device)" in done.out
    assert done.path.read_bytes() == before
    assert [p.name for p in done.path.parent.iterdir()] == ["table.json"]


def test_tables_that_cannot_be_kept_are_usage_errors(run_tune: Tune, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for text, problem in [
        ("{", "is not a table of launches .*remove it"),
        ('{"arch": "sm_00"}', "is not a table of launches"),
        (
            '{"arch":"sm_99","machine":{},"commit":"","measured_at":"","entries":[]}',
            "was measured on sm_99, and this GPU is sm_00: give another --output",
        ),
    ]:
        path.write_text(text)
        bench = Scripted()
        with pytest.raises(UsageError, match=problem):
            run_tune(bench)
        assert path.read_text() == text and bench.ran == []


def test_an_output_that_cannot_be_written_is_a_usage_error(run_tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\(Is a directory\): give an --output"):
        run_tune(Scripted(), output=tmp_path)
    (tmp_path / "file").touch()
    bench = Scripted()
    with pytest.raises(UsageError, match=r"cannot be written .*give an --output that is writable"):
        run_tune(bench, output=tmp_path / "file" / "table.json")
    assert bench.ran == []


def test_a_selection_without_a_norm_is_a_usage_error(run_tune: Tune) -> None:
    with pytest.raises(UsageError, match="has 4 positions: give a larger resolution"):
        run_tune(Scripted(), "channels=64", "resolution=1")


def test_the_calls_of_this_process_take_the_new_table(
    run_tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.forget()
    item = tune_choices.buckets(tune_choices.select(THREE))[0]
    assert tuned.launch_for("forward", item.problem, SMALL, "sm_00") is None
    run_tune(Scripted(), *THREE, output=None)
    assert (tmp_path / "sm_00.json").exists()
    assert tuned.launch_for("forward", item.problem, SMALL, "sm_00") is not None
    tuned.forget()


def test_the_result_fits_100_columns() -> None:
    bucket = Bucket("backward", "nhwc", 2, 16, 65536, 2048)
    choice = Choice("C", 8192, 16, 12, 32)
    rules = Choice("D", 4096, 8)
    item = BucketWork(bucket, PROBLEM, torch.float32, 1)

    def entry(choice: Choice, time_us: float) -> tuned.Entry:
        fields = choice._asdict()
        return tuned.Entry(bucket=bucket, time_us=time_us, rules_us=123456.78, **fields)

    wrong = tune_measure.Refusal(rules, "y has a relative error", True)
    outcomes = [
        BucketOutcome(item, entry(choice, 98765.43), rules),
        BucketOutcome(item, entry(rules, 123456.78), rules),
        BucketOutcome(item, None, rules, problem="the GPU's memory does not hold it"),
        BucketOutcome(item, None, rules, cut_short=True),
        BucketOutcome(item, None, rules, problem="the rules' own", refused=[wrong]),
    ]
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(tune_report.results_table(outcomes), width=WIDTH)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.strip("│").split("│") for line in lines if "backward" in line]
    name = "backward nhwc 16-bit 16×65536 ×2048"
    assert [[cell.strip() for cell in row] for row in rows] == [
        [name, "123,456.8", "98,765.4", "20%", "C 8192 w16 ×12 t32"],
        [name, "123,456.8", "", "", "the rules'"],
        [name, "–", "–", "–", "not measured"],
        [name, "–", "–", "–", "out of time"],
        [name, "–", "–", "–", "the rules' is WRONG"],
    ]


def test_choices_are_named_by_what_their_tier_reads() -> None:
    assert tune_choices.choice_name(Choice("A", 512, 4, 2)) == "A w4"
    assert tune_choices.choice_name(Choice("B", 512, 4, 2)) == "B 512 w4"
    assert tune_choices.choice_name(Choice("D", 512, 4, 3, 2)) == "D 512 w4 ×3 t2"
    assert tune_choices.choice_name(Choice("C", 512, 4, 3, 16)) == "C 512 w4 ×3 t16"


# The GPU, by a scripted torch.cuda


def test_without_a_gpu_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = TuneRequest(tune_choices.select(TINY), output=tmp_path / "sub" / "table.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="tune measures on a GPU, and PyTorch sees none"):
        tune.tune(request, Console())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with pytest.raises(UsageError, match="Triton is not installed"):
        tune.tune(request, Console())
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    with pytest.raises(UsageError, match="TRITON_INTERPRET=1 is set"):
        tune.tune(request, Console())


class FakeCuda:
    """What GpuBench asks of torch.cuda. events: what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.ready_after = 3  # queries
        self.broken = False
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.queries = 0

            def record(self) -> None:
                fake.events.append("record")

            def query(self) -> bool:
                self.queries += 1
                return self.queries > fake.ready_after

            def synchronize(self) -> None:
                fake.events.append("wait")

            def elapsed_time(self, end: "Event") -> float:
                return 0.25

        def synchronize(device: torch.device) -> None:
            fake.events.append("synchronize")
            if fake.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        properties = SimpleNamespace(L2_cache_size=1000)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(dispatch, "_machine", lambda device: (SMALL, "sm_00"))
        monkeypatch.setattr(dispatch, "interpreting", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_the_gpu_is_the_current_one(cuda: FakeCuda) -> None:
    bench = tune_gpu.open_gpu()
    assert (bench.name, bench.arch, bench.machine) == ("a GPU", "sm_00", SMALL)
    assert bench.device == torch.device("cuda", 0)


def some_case() -> tuple[Case, Launch]:
    return tune_cases.draw_case("forward", PROBLEM, torch.float32, CPU, 0), shaped(choices()[0])


def test_results_are_there_once_the_device_is_done(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"y": torch.zeros(1)}
    monkeypatch.setattr(
        tune_gpu, "launched", lambda case, how: cuda.events.append("launch") or results
    )
    assert tune_gpu.GpuBench(CPU).run(*some_case()) is results
    assert cuda.events == ["launch", "record"]


def test_a_launch_that_never_ends_is_given_up(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_gpu, "launched", lambda case, how: {})
    cuda.ready_after = 10**9
    with pytest.raises(DeviceLost, match=r"did not end within 0\.1s"):
        tune_gpu.GpuBench(CPU, hang_s=0.05).run(*some_case())
    assert "synchronize" not in cuda.events  # which would never return


@pytest.mark.parametrize("call", ["run", "time_us"])
@pytest.mark.parametrize("broken", [False, True], ids=["refused", "broken"])
def test_a_refused_launch_is_told_from_a_broken_context(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, broken: bool, call: str
) -> None:
    def fail(case: Case, how: Launch) -> Tensors:
        cuda.broken = broken
        raise RuntimeError("Triton Error [CUDA]: something")

    monkeypatch.setattr(tune_gpu, "launched", fail)
    bench = tune_gpu.GpuBench(CPU)
    with pytest.raises(DeviceLost if broken else RuntimeError, match=r"Triton Error \[CUDA\]"):
        getattr(bench, call)(*some_case())


def test_a_time_is_the_median_with_a_long_flush_before_each(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def allocate(size: int, **options: object) -> SimpleNamespace:
        sizes.append((size, options["dtype"]))
        return SimpleNamespace(zero_=lambda: cuda.events.append("flush"))

    bench = tune_gpu.GpuBench(CPU)
    case, how = some_case()
    monkeypatch.setattr(tune_gpu, "launched", lambda case, how: cuda.events.append("launch"))
    monkeypatch.setattr(torch, "empty", allocate)
    assert bench.time_us(case, how) == 250.0
    assert bench.time_us(case, how) == 250.0
    assert sizes == [(16 * 1000, torch.uint8)] * 2  # freed between two series
    assert cuda.events[:6] == ["synchronize", "flush", "record", "launch", "record", "wait"]


def test_giving_up_waits_for_nothing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    tune_gpu.GpuBench(CPU).give_up(3)
    assert codes == [3] and cuda.events == []


def test_the_kernels_get_the_launch_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for direction in DIRECTIONS:
        case = tune_cases.draw_case(direction, PROBLEM, torch.bfloat16, CPU, 0)
        for choice in choices(direction):
            how = shaped(choice, direction)
            with launch.recording() as recorded:
                tune_cases.launched(case, how)
            arguments = recorded[0].arguments
            assert arguments["num_warps"] == how.num_warps
            assert arguments["BLOCK_HW"] == how.block_hw and arguments["p_seed"] is None
            assert all(arguments[f"p_{name}"] is not None for name in ("scale", "shift", "pre"))
