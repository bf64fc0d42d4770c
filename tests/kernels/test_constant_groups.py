"""Groups of one value: σ² is 0 and rstd 1/√eps, by which every rounding is multiplied.

x̂ is exactly 0 there, and so is eager's without an affine of its own; with one, PyTorch folds the
mean into it, and x·rγ − μ·rγ cancels to a rounding of μ·rγ. Ours is at most twice as wrong as
eager's, and exact where eager's is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.oracle import NAMES, Problem, eager, error, gradients, problem
from support.running import Runner

pytestmark = pytest.mark.slow

GROUPS = 2
SHAPES = {"map": (2, 8, 7, 7), "even map": (1, 4, 8, 8), "one position": (2, 2, 1, 1)}


def constant(
    shape: tuple[int, ...], value: float, eps: float = 1e-5, channels_last: bool = False
) -> Problem:
    p = problem(*shape, groups=GROUPS, activation=None, channels_last=channels_last)
    return replace(p, x=torch.full_like(p.x, value), eps=eps)


def check(run: Runner, p: Problem) -> None:
    truth, usual, ours = eager(p.to(torch.float64)), eager(p), run(p)
    # Of an offset that is added to an exact 0 the rounding, and no more.
    allowed = 2 * torch.finfo(torch.float32).eps * float(truth.norm())
    limit = 2 * float((usual.double() - truth).norm()) + allowed
    found = float((ours.double() - truth).norm())
    assert found <= limit, f"error {found:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("value", "eps"), [(0.01, 1e-5), (3.3, 1e-6), (-1e4, 1e-5)])
def test_norm_alone_is_exactly_zero(
    run: Runner, value: float, eps: float, shape: tuple[int, ...]
) -> None:
    p = constant(shape, value, eps)
    p = replace(p, **dict.fromkeys(NAMES))
    # The oracle's eager passes a weight of ones, which this is not.
    assert not torch.nn.functional.group_norm(p.x, GROUPS, eps=eps).any()
    assert not run(p).any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("value", [3.3, -1e4])
def test_modulation_alone_is_its_shift(run: Runner, value: float, shape: tuple[int, ...]) -> None:
    p = replace(constant(shape, value), weight=None, bias=None)
    offset = p.shift[:, :, None, None].expand(p.x.shape)
    assert torch.equal(run(p), offset)
    assert torch.equal(run(replace(p, scale=None)), offset)
    assert not run(replace(p, shift=None)).any()


@pytest.mark.parametrize("value", [3.3, 100.0])
@pytest.mark.parametrize("affine", ["ones", "random"])
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_affine(
    run: Runner,
    channels_last: bool,
    modulated: bool,
    affine: str,
    value: float,
) -> None:
    p = constant(SHAPES["even map"], value, channels_last=channels_last)
    if affine == "ones":
        p = replace(p, weight=torch.ones_like(p.weight), bias=torch.zeros_like(p.bias))
    if not modulated:
        p = replace(p, scale=None, shift=None)
    check(run, p)


# NumPy, in the interpreter: lanes past the end, which are far from the mean and never stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
def test_16_bits(run: Runner, modulated: bool, dtype: torch.dtype) -> None:
    p = replace(constant(SHAPES["map"], 9984.0), weight=None, bias=None).to(dtype)
    if not modulated:
        p = replace(p, scale=None, shift=None)
        assert not run(p).any()
    else:
        assert torch.equal(run(p), p.shift[:, :, None, None].expand(p.x.shape))


def test_one_constant_group_beside_others(run: Runner) -> None:
    p = replace(constant(SHAPES["map"], 100.0), weight=None, bias=None)
    p.x[1, 4:] = torch.randn(4, 7, 7)
    y = run(p)
    constants = torch.ones(p.x.shape[:2], dtype=torch.bool)
    constants[1, 4:] = False
    assert torch.equal(y[constants], p.shift[:, :, None, None].expand(p.x.shape)[constants])
    check(run, p)


@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
def test_gradients(run: Runner, modulated: bool) -> None:
    """Where γ'·dz sums to nothing over a group, dx is r·γ'·dz; those of scale and weight are 0."""
    p = constant((2, 8, 8, 8), 100.0)
    p = replace(p, dy=p.dy - p.dy.flatten(2).mean(2)[..., None, None])
    if not modulated:
        p = replace(p, scale=None, shift=None)
    truth, usual, ours = (gradients(f, q) for f, q in ((eager, p.to(torch.float64)), (eager, p),
                                                       (run, p)))  # fmt: skip
    for name, exact in truth.items():
        norm = float(exact.norm())
        limit = 2 * float((usual[name].double() - exact).norm()) + 1e-6 * norm + 1e-3
        found = float((ours[name].double() - exact).norm())
        assert found <= limit, f"{name}: error {found:.3g}, limit {limit:.3g}"
    assert error(ours["x"], truth["x"]) < 1e-4


@pytest.mark.parametrize("mean", [10.0, 1e3, 1e4])
def test_mean_far_from_zero_without_affine(run: Runner, mean: float) -> None:
    """Eager subtracts the mean before anything else, and is as exact as the mean."""
    p = problem(2, 8, 8, 8, groups=2, affine=False, mean=mean, activation=None)
    check(run, p)
    check(run, replace(p, scale=None, shift=None))
