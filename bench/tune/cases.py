"""One problem with its tensors, what a launch makes of it, and what is right."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from resblock_bench.bench.measure import operator
from resblock_bench.bench.measure.correctness import limit
from resblock_bench.bench.measure.operator import PART_ELEMENTS, CallInputs, Tensors
from resblock_bench.kernels.spec import Modulation, Spec
from resblock_bench.kernels.tiers import Direction, Launch, Problem

NORM_FACTOR = 2.0
ELEMENT_FACTOR = 4.0
_BITS = {2: torch.int16, 4: torch.int32}


class Saved(NamedTuple):
    """What a backward reads of its forward, for each group."""

    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class Case:
    """The tensors of one call with everything present; saved None: of a forward."""

    inputs: CallInputs
    spec: Spec
    saved: Saved | None


def draw_case(
    direction: Direction, problem: Problem, dtype: torch.dtype, device: torch.device, seed: int
) -> Case:
    """Normal tensors; the modulation as a block passes it to its second norm.

    Without a pre_shift where a channel is a group: it then has no effect, and its gradient no
    relative error.
    """
    positions = (problem.HW, 1) if problem.channels_last else (problem.HW,)
    inputs = operator.draw(
        (problem.N, problem.C, *positions),
        problem.G,
        dtype,
        channels_last=problem.channels_last,
        scale_shift=True,
        pre_shift=problem.channels_per_group > 1,
        device=device,
        seed=seed,
    )
    saved = None
    if direction == "backward":
        truth = operator.in_parts(operator.forward, inputs, torch.float64)
        saved = Saved(truth["mean"].float(), truth["rstd"].float())
    return Case(inputs, Spec(problem.G, operator.EPS, True, 0.0, dtype), saved)


def launched(case: Case, how: Launch) -> Tensors:
    """Launch a case; what it returns, by name. Does not wait for the device."""
    # Here and not above: it needs Triton, which is asked for later.
    from resblock_bench.kernels import launch

    x, dy, modulation, _ = case.inputs
    if case.saved is None:
        y, mean, rstd = launch.forward(x, modulation, None, case.spec, how)
        return {"y": y, "mean": mean, "rstd": rstd}
    dx, gradients = launch.backward(dy, x, *case.saved, modulation, None, case.spec, how)
    named = zip(Modulation._fields, gradients, strict=True)
    return {"dx": dx} | {f"d{name}": g for name, g in named if g is not None}


def reference(case: Case, dtype: torch.dtype | None = None) -> Tensors:
    """What a launch should return, of eager PyTorch; in `dtype`, or as the case stands."""
    if case.saved is None:
        return operator.in_parts(operator.forward, case.inputs, dtype)
    return operator.in_parts(_backward, case.inputs, dtype)


def _backward(inputs: CallInputs) -> Tensors:
    found = operator.gradients(inputs)
    del found["y"]
    return found


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
    """limit(norm) = 2 · that of `correctness`, limit(element) = 4 · max(eager's, eps · peak).

    There is more room than for a whole block, since small tiles add up more roughly than eager
    does. Eager is the same formula in the case's own dtypes, eps that of a result's, and peak its
    largest element over its root mean square. One wrong tile of many hardly shows in a norm, but
    its elements are off by about the root mean square; hence the second measure.
    """
    tensors, eager = reference(case, torch.float64), reference(case)
    limits = {}
    for name, error in errors(eager, tensors).items():
        exact = tensors[name]
        dtype = eager[name].dtype
        peak = float(vector_norm(exact, math.inf) / vector_norm(exact)) * exact.numel() ** 0.5
        limits[name] = Error(
            NORM_FACTOR * limit(error.norm, dtype),
            ELEMENT_FACTOR * max(error.element, torch.finfo(dtype).eps * peak),
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
        most = truth.limits[name]
        if math.isnan(error.norm):
            return f"{name} has elements that are NaN or were never written"
        if not error.norm <= most.norm:
            return f"{name} has a relative error of {error.norm:.2g}, and {most.norm:.2g} is right"
        if not error.element <= most.element:
            return (
                f"an element of {name} is off by {error.element:.2g} of the root mean square, and "
                f"{most.element:.2g} is right"
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
