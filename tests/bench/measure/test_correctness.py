import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resblock_bench.bench.measure import correctness
from resblock_bench.bench.measure.correctness import _unlucky, check, compute_truth, relative_errors
from resblock_bench.bench.measure.implementations import block_arguments
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell, Row
from resblock_bench.reference import ResBlock

CPU = torch.device("cpu")
MakeCell = Callable[..., Cell]


def results(cell: Cell) -> dict[str, Tensor]:
    return Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU).results()


def test_the_truth_is_the_reference_in_float64(make_cell: MakeCell) -> None:
    cell = make_cell(channels=64, updown="down", batch=3)
    block = ResBlock(**block_arguments(cell))
    block.load_state_dict(draw_weights(cell, 0))
    block.double()
    inputs = draw_inputs(cell, CPU, 0)
    x, emb = inputs.x.double().requires_grad_(), inputs.emb.double().requires_grad_()
    out = block(x, emb)
    torch.autograd.backward(out, inputs.cotangent.double())
    truth = compute_truth(cell, CPU, 0, 0).tensors
    expected = {"out": out.detach(), "grad x": x.grad, "grad emb": emb.grad}
    expected |= {f"grad {name}": p.grad for name, p in block.named_parameters()}
    assert truth.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(truth[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_the_truth_in_parts_is_the_truth(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cell(batch=5, channels=64)
    whole = compute_truth(cell, CPU, 0, 0).tensors
    monkeypatch.setattr(correctness, "_PART_ELEMENTS", 2 * 64 * 8 * 8)
    parts = compute_truth(cell, CPU, 0, 0).tensors
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-11, atol=1e-12, msg=name)


def test_where_eager_does_not_fit_its_error_is_found_in_parts(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that needs less memory may fit where eager does not, and still needs a limit."""
    cell = make_cell(batch=4, channels=64)
    whole = compute_truth(cell, CPU, 0, 0)

    class Tight(Workload):
        def results(self) -> dict[str, Tensor]:
            if self.x.shape[0] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().results()

    monkeypatch.setattr(correctness, "Workload", Tight)
    monkeypatch.setattr(correctness, "_PART_ELEMENTS", 2 * 64 * 8 * 8)
    parts = compute_truth(cell, CPU, 0, 0)
    assert parts.limits == pytest.approx(whole.limits, rel=0.5)
    assert parts.limits["out"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_limits_are_twice_the_eager_error_or_the_floor(make_cell: MakeCell, dtype: str) -> None:
    cell = make_cell(dtype=dtype, channels=64)
    truth = compute_truth(cell, CPU, 0, 0)
    eager = relative_errors(results(cell), truth.tensors, truth.scales)
    floor = {"fp32": 4 * 2**-23, "bf16": 2**-7, "fp16": 2**-10}[dtype]
    assert truth.limits == {name: max(2 * error, floor) for name, error in eager.items()}
    assert 0 < eager["out"] < 2**-7


def test_an_error_at_its_limit_passes_and_just_above_fails(make_cell: MakeCell) -> None:
    truth = compute_truth(make_cell(mode="inference"), CPU, 0, 0)
    exact = truth.tensors["out"]
    limit = truth.limits["out"]
    assert check({"out": exact * (1 + 0.999 * limit)}, truth)[0]
    right, record = check({"out": exact * (1 + 1.001 * limit)}, truth)
    assert not right
    assert record.worst == "out"
    assert record.errors["out"] == pytest.approx(1.001 * limit, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong_and_worst(make_cell: MakeCell, bad: float) -> None:
    cell = make_cell()
    truth = compute_truth(cell, CPU, 0, 0)
    found = results(cell)
    found["grad emb"][0, 0] = bad
    right, record = check(found, truth)
    assert not right
    assert (record.worst, record.errors["grad emb"]) == ("grad emb", None)


def test_a_missing_or_misshapen_result_is_wrong(make_cell: MakeCell) -> None:
    cell = make_cell()
    truth = compute_truth(cell, CPU, 0, 0)
    found = results(cell)
    assert check(found, truth)[0]
    assert not check({**found, "grad emb": found["grad emb"][:1]}, truth)[0]
    del found["grad x"]
    assert not check(found, truth)[0]


def test_a_vanishing_gradient_is_held_against_the_typical_one(make_cell: MakeCell) -> None:
    """With one channel a group the norm cancels the bias before it: its true gradient is 0."""
    cell = make_cell(channels=32, out_channels=32, conditioning="scale_shift")
    truth = compute_truth(cell, CPU, 0, 0)
    name = "grad in_layers.2.bias"
    assert truth.tensors[name].norm() < 1e-9 * truth.scales[name]
    assert check(results(cell), truth)[0]
    wrong = results(cell)
    wrong[name] += 1e-3 * truth.scales[name]
    assert not check(wrong, truth)[0]


@pytest.mark.parametrize("mode", ["inference", "forward", "train"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_project_s_own_block_is_right(
    measure: Callable[..., Row], mode: str, dtype: str
) -> None:
    row = measure(impl="fused", mode=mode, dtype=dtype, channels=64, out_channels=96)
    assert row.status == "ok", row.reason
    assert row.correctness is not None
    assert ("grad x" in row.correctness.errors) == (mode == "train")


def slightly_off(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    out: Tensor = module(x, emb)
    return out * (1 + 1e-5)


class HalfGradient(torch.autograd.Function):
    """Identity whose backward loses a thousandth."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * 0.999


@pytest.mark.parametrize(
    ("name", "around", "worst"),
    [
        ("output", slightly_off, None),
        ("gradient", lambda m, x, emb: m(HalfGradient.apply(x), emb), "grad x"),
        ("embedding", lambda m, x, emb: m(x, HalfGradient.apply(emb)), "grad emb"),
        ("nan", lambda m, x, emb: m(x, emb) * float("nan"), None),
    ],
)
def test_a_seeded_fault_is_found_and_not_timed(
    measure: Callable[..., Row],
    add_implementation: Callable[..., None],
    name: str,
    around: Callable[..., Tensor],
    worst: str | None,
) -> None:
    add_implementation("wrong", around)
    row = measure(impl="wrong")
    assert row.status == "wrong"
    assert row.correctness is not None
    assert row.correctness.worst == (worst or row.correctness.worst)
    assert "above its limit" in (row.reason or "")
    assert (row.samples_ms, row.median_ms, row.memory) == (None, None, None)


def test_dropout_is_off_for_the_check_and_on_for_the_timing(
    measure: Callable[..., Row], add_implementation: Callable[..., None]
) -> None:
    seen: list[float] = []

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        seen.append(module.get_submodule("out_layers.2").p)
        out: Tensor = module(x, emb)
        return out

    add_implementation("spied", around)
    row = measure(impl="spied", dropout=0.5)
    assert (row.status, row.axes.dropout) == ("ok", 0.5)
    assert row.correctness is not None
    assert row.correctness.dropout == 0.0
    # The first step is the cell's own, for its cold memory; what it returns is not checked.
    assert seen[:2] == [0.5, 0.0]
    assert set(seen[2:-1]) == {0.5}
    assert seen[-1] == 0.0


def test_in_a_model_no_result_has_to_be_closer_than_their_median() -> None:
    errors = {"a": 1.0, "b": 2.0, "c": 5.0}
    assert _unlucky(errors) == {"a": 2.0, "b": 2.0, "c": 5.0}
