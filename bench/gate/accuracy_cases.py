"""Small calls of the operator at fixed seeds, and how far their results are from float64.

    error(t) = ‖t − t64‖ / ‖t64‖

for the output and every gradient, of this project's operator and of eager PyTorch on the same
inputs. Some inputs lie 100 or 1000 standard deviations from zero, where statistics in the form
E[x²] − μ² lose four to six digits more than centred ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resblock_bench.bench.measure.correctness import EAGER_FACTOR, FLOOR_EPS, relative_errors
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.bench.records import Conditioning, DType, Layout
from resblock_bench.kernels.dispatch import Backend, prefer
from resblock_bench.kernels.functional import group_norm_silu
from resblock_bench.kernels.spec import Modulation, spread
from resblock_bench.kernels.tiers import Tier

RESULTS = ("y", "dx", *(f"d{name}" for name in Modulation._fields))
GROUPS = 4
_CHANNELS = 32
_EPS = 1e-5


class AccuracyCase(NamedTuple):
    """One call: (samples, 32 channels, size, size) in 4 groups, forward and backward.

    tier: of the interpreted Triton kernels, None for the path in PyTorch's own. mean: of x, whose
    standard deviation is 1. conditioning: scale and shift, or an add before the norm.
    """

    tier: Tier | None
    dtype: DType
    layout: Layout
    conditioning: Conditioning
    mean: float
    samples: int
    size: int

    @property
    def name(self) -> str:
        at = f" mean {self.mean:g}σ" if self.mean else ""
        return f"{self.samples}×{self.size}² {self.dtype} {self.layout} {self.conditioning}{at}"


class Errors(NamedTuple):
    """Of each result by name: the operator's error, eager PyTorch's, and what is allowed.

    limit = max(2 · eager, floor), with the floor of `correctness`.
    """

    ours: dict[str, float]
    eager: dict[str, float]
    limits: dict[str, float]


OperatorCall = Callable[[Tensor, Modulation], Tensor]


def measure(case: AccuracyCase) -> Errors:
    """Run a case. A tier needs TRITON_INTERPRET=1 before the kernels are imported."""
    x, dy, modulation = _inputs(case)
    doubled = Modulation(*(None if t is None else t.double() for t in modulation))
    truth = _results(_eager, x.double(), dy.double(), doubled)
    scales = {name: float(tensor.norm()) for name, tensor in truth.items()}
    backend: Backend = "aten" if case.tier is None else "triton"
    # Interpreted, lanes beyond the end of a group overflow on their way to being masked.
    with prefer(backend, case.tier), np.errstate(over="ignore"):
        found = _results(_operator, x, dy, modulation)
    ours = relative_errors(found, truth, scales)
    eager = relative_errors(_results(_eager, x, dy, modulation), truth, scales)
    floor = FLOOR_EPS[case.dtype] * torch.finfo(DTYPES[case.dtype]).eps
    limits = {name: max(EAGER_FACTOR * error, floor) for name, error in eager.items()}
    return Errors(ours, eager, limits)


def _inputs(case: AccuracyCase) -> tuple[Tensor, Tensor, Modulation]:
    """As a 16-bit model has them: the affine is float32, everything else in the case's dtype."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (case.samples, _CHANNELS, case.size, case.size)
    x, dy = (case.mean + normal(*shape)).to(dtype), normal(*shape).to(dtype)
    if case.layout == "nhwc":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    weight, bias = 1 + 0.5 * normal(_CHANNELS), normal(_CHANNELS)
    if case.conditioning == "add":
        return x, dy, Modulation(weight, bias, pre_shift=normal(case.samples, _CHANNELS).to(dtype))
    # One tensor split in two: their rows lie 2C apart, as from chunk.
    scale, shift = normal(case.samples, 2 * _CHANNELS).to(dtype).chunk(2, dim=1)
    return x, dy, Modulation(weight, bias, scale, shift)


def _results(
    call: OperatorCall, x: Tensor, dy: Tensor, modulation: Modulation
) -> dict[str, Tensor]:
    """The output as "y" and every gradient as "dx", "dweight", …"""
    named = {"x": x, **modulation._asdict()}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    y = call(leaves["x"], Modulation(*map(leaves.get, Modulation._fields)))
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    of = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **of}


def _operator(x: Tensor, m: Modulation) -> Tensor:
    return group_norm_silu(
        x, GROUPS, m.weight, m.bias, m.scale, m.shift, pre_shift=m.pre_shift, eps=_EPS
    )


def _eager(x: Tensor, m: Modulation) -> Tensor:
    """As the published blocks compute it: the norm in at least float32, all else in x's dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    h = (x if m.pre_shift is None else x + spread(m.pre_shift, x)).to(compute)
    z = F.group_norm(h, GROUPS, m.weight, m.bias, _EPS).to(x.dtype)
    if m.scale is not None and m.shift is not None:
        z = z * (1 + spread(m.scale, x)) + spread(m.shift, x)
    return F.silu(z)
