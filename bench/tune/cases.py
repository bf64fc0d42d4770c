"""One problem with its tensors, what a launch makes of it, and what is right."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from resblock_bench.kernels.spec import Modulation, Spec, spread
from resblock_bench.kernels.tiers import (
    Direction,
    Launch,
    Problem,
)

Tensors = dict[str, Tensor]
EPS = 1e-5
EAGER_FACTOR = 2.0
ELEMENT_FACTOR = 4.0
FLOOR_EPS = 4
# Elements of the part of a case whose reference is computed at once, in float64.
PART_ELEMENTS = 2**24
_BITS = {2: torch.int16, 4: torch.int32}


class Saved(NamedTuple):
    """What the backward reads beside what the forward reads."""

    dy: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class Case:
    """The tensors of one call with everything present; saved None: of a forward."""

    x: Tensor
    modulation: Modulation
    spec: Spec
    saved: Saved | None


def draw_case(
    direction: Direction, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int
) -> Case:
    """Standard normal tensors; the modulation as a block passes it to its second norm.

    The affine is fp32 and the rest in `dtype`. Without a pre_shift where a channel is a group: it
    then has no effect, and its gradient no relative error.
    """
    N, C, HW = problem.N, problem.C, problem.HW
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    def activation() -> Tensor:
        if not problem.channels_last:
            return normal(N, C, HW)
        return normal(N, C, HW, 1).contiguous(memory_format=torch.channels_last)

    x = activation()
    # One tensor split in two: their rows lie 2C apart, as from chunk.
    scale, shift = normal(N, 2 * C).chunk(2, dim=1)
    modulation = Modulation(
        weight=1 + normal(C, dtype=torch.float32),
        bias=normal(C, dtype=torch.float32),
        scale=scale,
        shift=shift,
        pre_shift=normal(N, C) if problem.channels_per_group > 1 else None,
    )
    case = Case(x, modulation, Spec(problem.G, EPS, True, 0.0, dtype), None)
    if direction == "forward":
        return case
    truth = reference(case, torch.float64)
    saved = Saved(activation(), truth["mean"].float(), truth["rstd"].float())
    return Case(x, modulation, case.spec, saved)


def launched(case: Case, how: Launch) -> Tensors:
    """Launch a case; what it returns, by name. Does not wait for the device."""
    # Here and not above: it needs Triton, which is asked for later.
    from resblock_bench.kernels import launch

    if case.saved is None:
        y, mean, rstd = launch.forward(case.x, case.modulation, None, case.spec, how)
        return {"y": y, "mean": mean, "rstd": rstd}
    dx, gradients = launch.backward(
        case.saved.dy,
        case.x,
        case.saved.mean,
        case.saved.rstd,
        case.modulation,
        None,
        case.spec,
        how,
    )
    named = zip(Modulation._fields, gradients, strict=True)
    return {"dx": dx} | {f"d{name}": g for name, g in named if g is not None}


def reference(case: Case, dtype: torch.dtype | None = None) -> Tensors:
    """A case in eager PyTorch as the published blocks compute it; in `dtype`, or as it stands.

    The norm in at least fp32, everything else in x's dtype. A few samples at a time, so that
    float64 needs little memory beside its results; the affine's gradients are summed in float64.
    """
    size = max(1, PART_ELEMENTS // case.x[0].numel())
    parts = []
    for first in range(0, len(case.x), size):
        part = _samples(case, slice(first, first + size))
        parts.append(_reference_of(part if dtype is None else _converted(part, dtype)))
    joined = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in ("dweight", "dbias"):
            joined[name] = torch.stack(pieces).sum(0, dtype=torch.float64).to(pieces[0].dtype)
        else:
            joined[name] = torch.cat(pieces)
    return joined


def _converted(case: Case, dtype: torch.dtype) -> Case:
    saved = None if case.saved is None else Saved(*(t.to(dtype) for t in case.saved))
    rows = Modulation(*(None if t is None else t.to(dtype) for t in case.modulation))
    return Case(case.x.to(dtype), rows, case.spec, saved)


def _samples(case: Case, rows: slice) -> Case:
    pick = Modulation(*(t if t is None or t.dim() == 1 else t[rows] for t in case.modulation))
    saved = None if case.saved is None else Saved(*(t[rows] for t in case.saved))
    return Case(case.x[rows], pick, case.spec, saved)


def _reference_of(case: Case) -> Tensors:
    if case.saved is None:
        with torch.no_grad():
            return _formula(case.x, case.modulation, case.spec)
    named = {"x": case.x, **case.modulation._asdict()}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    rows = Modulation(*(leaves.get(name) for name in Modulation._fields))
    y = _formula(leaves["x"], rows, case.spec)["y"]
    gradients = torch.autograd.grad(y, list(leaves.values()), case.saved.dy)
    return {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def _formula(x: Tensor, m: Modulation, spec: Spec) -> Tensors:
    """silu(norm(x + pre_shift)·γ·(1 + s) + …), and mean and rstd of every group."""
    compute = torch.promote_types(x.dtype, torch.float32)
    h = (x if m.pre_shift is None else x + spread(m.pre_shift, x)).to(compute)
    groups = h.reshape(len(x), spec.num_groups, -1)
    rstd = (groups.var(2, correction=0) + spec.eps).rsqrt()
    assert m.weight is not None and m.bias is not None
    assert m.scale is not None and m.shift is not None
    weight, bias = m.weight.to(compute), m.bias.to(compute)
    z = F.group_norm(h, spec.num_groups, weight, bias, spec.eps).to(x.dtype)
    y = F.silu(z * (1 + spread(m.scale, x)) + spread(m.shift, x))
    return {"y": y, "mean": groups.mean(2), "rstd": rstd}


class Error(NamedTuple):
    """norm: ‖t − t64‖ / ‖t64‖. element: the largest |t − t64| over the root mean square of t64."""

    norm: float
    element: float


@dataclass(frozen=True)
class CallTruth:
    """A case's results in float64, and how far a launch's may be from them."""

    tensors: Tensors
    limits: dict[str, Error]


def truth_of(case: Case) -> CallTruth:
    """limit(norm) = 2 · eager's + 4 eps, limit(element) = 4 · the larger of eager's and eps · peak.

    Eager is the same formula in the case's own dtypes, eps that of a result's, and peak its largest
    element over its root mean square. One wrong tile of many hardly shows in a norm, but its
    elements are off by about the root mean square; hence the second measure.
    """
    tensors, eager = reference(case, torch.float64), reference(case)
    limits = {}
    for name, error in errors(eager, tensors).items():
        exact = tensors[name]
        eps = torch.finfo(eager[name].dtype).eps
        peak = float(vector_norm(exact, math.inf) / vector_norm(exact)) * exact.numel() ** 0.5
        limits[name] = Error(
            EAGER_FACTOR * error.norm + FLOOR_EPS * eps,
            ELEMENT_FACTOR * max(error.element, eps * peak),
        )
    return CallTruth(tensors, limits)


def errors(results: Tensors, truth: Tensors) -> dict[str, Error]:
    """How wrong each tensor is; infinite where it is missing or misshapen, NaN where it holds NaN.

    Piece by piece, so that no second float64 copy of a large tensor is needed.
    """
    found = {}
    for name, exact in truth.items():
        got = results.get(name)
        if got is None or got.shape != exact.shape:
            found[name] = Error(math.inf, math.inf)
            continue
        size = max(1, PART_ELEMENTS // exact[0].numel())
        norms, largest = [], []
        for part, wanted in zip(torch.split(got, size), torch.split(exact, size), strict=True):
            difference = part.double() - wanted
            norms.append(vector_norm(difference))
            largest.append(vector_norm(difference, math.inf))
        scale = vector_norm(exact)
        found[name] = Error(
            float(vector_norm(torch.stack(norms)) / scale),
            float(vector_norm(torch.stack(largest), math.inf) / scale) * exact.numel() ** 0.5,
        )
    return found


def mistake(results: Tensors, truth: CallTruth) -> str | None:
    """What is wrong with a launch's results, or None."""
    for name, error in errors(results, truth.tensors).items():
        limit = truth.limits[name]
        if math.isnan(error.norm):
            return f"{name} has elements that are NaN or were never written"
        if not error.norm <= limit.norm:
            return f"{name} has a relative error of {error.norm:.2g}, and {limit.norm:.2g} is right"
        if not error.element <= limit.element:
            return (
                f"an element of {name} is off by {error.element:.2g} of the root mean square, and "
                f"{limit.element:.2g} is right"
            )
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block torch.empty is full of NaN, so that what nobody writes is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
