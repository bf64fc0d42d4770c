"""One call of the operator: its inputs, its truth, and when a result counts as wrong."""

import pytest
import torch
from support import oracle
from support.tuning import CPU, DIRECTIONS, PROBLEM, choices, shaped

from resblock_bench.bench.measure import operator
from resblock_bench.bench.tune import cases as tune_cases
from resblock_bench.kernels import dispatch, launch
from resblock_bench.kernels.tiers import Direction, Problem


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
