"""The operator as eager PyTorch computes it: what it is given, its formula, and its results.

    h = x + pre_shift        y = silu(norm(h)·(1 + scale) + shift)

with the affine in the norm. In float64 the results are the truth that any other way to compute them
is held against; in the dtypes of the inputs they say how far from it one may be
(`correctness.limit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resblock_bench.kernels.spec import Modulation, spread

Tensors = dict[str, Tensor]
EPS = 1e-5
PART_ELEMENTS = 2**24
"""Elements of x whose results are computed at once."""


class CallInputs(NamedTuple):
    """x and the gradient of y: (N, C, *S); what modulates it; the number of groups."""

    x: Tensor
    dy: Tensor
    modulation: Modulation
    groups: int

    def part(self, samples: slice, dtype: torch.dtype | None) -> CallInputs:
        """Some samples, in `dtype` or as they stand."""

        def taken(t: Tensor) -> Tensor:
            return (t if t.dim() == 1 else t[samples]).to(dtype or t.dtype)

        rows = (None if t is None else taken(t) for t in self.modulation)
        return CallInputs(taken(self.x), taken(self.dy), Modulation(*rows), self.groups)


def draw(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    *,
    channels_last: bool,
    scale_shift: bool,
    pre_shift: bool,
    mean: float = 0.0,
    device: torch.device | None = None,
    seed: int = 0,
) -> CallInputs:
    """Normal inputs as a 16-bit model has them: the affine is float32, everything else in `dtype`.

    shape                    (N, C, *S)
    scale_shift, pre_shift   whether there are a scale and a shift, and a pre_shift
    mean                     of x, whose standard deviation is 1
    """
    generator = torch.Generator(device or "cpu").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x, dy = (mean + normal(*shape)).to(dtype), normal(*shape).to(dtype)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    N, C = shape[:2]
    m = Modulation(weight=1 + 0.5 * normal(C), bias=normal(C))
    if pre_shift:
        m = m._replace(pre_shift=normal(N, C).to(dtype))
    if scale_shift:
        # One tensor split in two: their rows lie 2C apart, as from chunk.
        scale, shift = normal(N, 2 * C).to(dtype).chunk(2, dim=1)
        m = m._replace(scale=scale, shift=shift)
    return CallInputs(x, dy, m, groups)


def eager(x: Tensor, m: Modulation, groups: int) -> Tensor:
    """As the published blocks compute it: the norm in at least float32, all else in x's dtype."""
    z = F.group_norm(_normed(x, m), groups, m.weight, m.bias, EPS).to(x.dtype)
    if m.scale is not None and m.shift is not None:
        z = z * (1 + spread(m.scale, x)) + spread(m.shift, x)
    return F.silu(z)


def _normed(x: Tensor, m: Modulation) -> Tensor:
    h = x if m.pre_shift is None else x + spread(m.pre_shift, x)
    return h.to(torch.promote_types(x.dtype, torch.float32))


def forward(inputs: CallInputs) -> Tensors:
    """Eager's y, and of every group the mean and 1/√(variance + eps) as "mean" and "rstd"."""
    x, _, m, groups = inputs
    with torch.no_grad():
        rows = _normed(x, m).reshape(len(x), groups, -1)
        rstd = (rows.var(2, correction=0) + EPS).rsqrt()
        return {"y": eager(x, m, groups), "mean": rows.mean(2), "rstd": rstd}


def gradients(
    inputs: CallInputs, call: Callable[[Tensor, Modulation, int], Tensor] = eager
) -> Tensors:
    """The output of a call as "y", and every gradient as "dx", "dweight", …"""
    named = {"x": inputs.x, **inputs.modulation._asdict()}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    rows = Modulation(*map(leaves.get, Modulation._fields))
    y = call(leaves["x"], rows, inputs.groups)
    found = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    of = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {"y": y.detach(), **of}


def in_parts(
    results: Callable[[CallInputs], Tensors], inputs: CallInputs, dtype: torch.dtype | None = None
) -> Tensors:
    """`forward` or `gradients` in `dtype`, or as the inputs stand, a few samples at a time.

    So float64 needs little memory beside its results. The affine's gradients are summed in it.
    """
    size = max(1, PART_ELEMENTS // inputs.x[0].numel())
    starts = range(0, len(inputs.x), size)
    parts = [results(inputs.part(slice(first, first + size), dtype)) for first in starts]
    joined = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in ("dweight", "dbias"):
            joined[name] = torch.stack(pieces).sum(0, dtype=torch.float64).to(pieces[0].dtype)
        else:
            joined[name] = torch.cat(pieces)
    return joined
