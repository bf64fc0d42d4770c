"""Which launch of a bucket is taken, and which are refused."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.tuning import (
    CPU,
    DIRECTIONS,
    PROBLEM,
    SMALL,
    Interpreted,
    Scripted,
    choices,
    measured,
    shaped,
    work,
)
from torch import Tensor

from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.tune import bucket as tune_measure
from resblock_bench.bench.tune import cases as tune_cases
from resblock_bench.bench.tune import choices as tune_choices
from resblock_bench.bench.tune.cases import Case
from resblock_bench.bench.tune.choices import BucketWork
from resblock_bench.bench.tune.gpu import DeviceLost
from resblock_bench.kernels import tiers
from resblock_bench.kernels.tiers import Choice, Direction, Launch, Problem


@pytest.mark.slow
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


def test_a_launch_must_repeat_to_the_bit() -> None:
    def nudge(case: Case, how: Launch, out: Tensors) -> Tensors:
        return out | {"y": out["y"] * (1 + 2**-23 * (len(bench.ran) > 1))}

    bench = Scripted(around=nudge)
    outcome = measured(bench)
    assert outcome.refused[0] == tune_measure.Refusal(
        choices()[0], "y differs from run to run", True
    )


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


def test_a_lost_device_ends_it_and_names_the_launch() -> None:
    def time_us(how: Launch) -> float:
        if len(bench.timed) == 2:
            raise DeviceLost("did not end within 20s")
        return 10.0

    bench = Scripted(time_us)
    name = tune_choices.choice_name(choices()[1])
    with pytest.raises(DeviceLost, match=f"forward nchw 32-bit 3×300 ×2: {name} did not end"):
        measured(bench)
