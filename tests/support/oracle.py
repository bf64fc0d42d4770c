"""The operator as eager PyTorch computes it, and the measure that every implementation is held to.

error(out) = ‖out − ref64‖ / ‖ref64‖ against float64, for the output and for every gradient. The
limit is twice the error of eager PyTorch at the same dtype, with a floor of a few roundings, since
eager is at times exact by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("weight", "bias", "scale", "shift", "pre_shift")


@dataclass(frozen=True)
class Problem:
    """One call: x, its gradient, and the modulation, in the dtypes in which they are passed."""

    x: Tensor
    dy: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    pre_shift: Tensor | None = None
    eps: float = 1e-5
    activation: str | None = "silu"

    def to(self, dtype: torch.dtype) -> Problem:
        cast = {name: getattr(self, name) for name in ("x", "dy", *NAMES)}
        return replace(self, **{k: v if v is None else v.to(dtype) for k, v in cast.items()})


def problem(
    *shape: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    affine: bool = True,
    modulated: bool = True,
    pre_shift: bool = False,
    activation: str | None = "silu",
    channels_last: bool = False,
    mean: float = 0.0,
    std: float = 1.0,
    seed: int = 0,
) -> Problem:
    """A random problem. The affine is fp32 as in a 16-bit model, the modulation in x's dtype."""
    g = torch.Generator().manual_seed(seed)
    N, C = shape[:2]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    x, dy = (mean + std * normal(*shape)).to(dtype), normal(*shape).to(dtype)
    if channels_last:
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
        x, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    # One tensor split in two: scale and shift arrive with a row stride of 2C, as from chunk.
    scale, shift = normal(N, 2 * C).to(dtype).chunk(2, dim=1) if modulated else (None, None)
    return Problem(
        x,
        dy,
        groups,
        (1 + normal(C)) if affine else None,
        normal(C) if affine else None,
        scale,
        shift,
        (std * normal(N, C)).to(dtype) if pre_shift else None,
        activation=activation,
    )


def eager(p: Problem) -> Tensor:
    """What the published blocks do: the norm in at least fp32, everything else in x's dtype."""

    def spread(t: Tensor) -> Tensor:
        return t.to(p.x.dtype).reshape(*t.shape, *(1,) * (p.x.dim() - 2))

    x = p.x if p.pre_shift is None else p.x + spread(p.pre_shift)
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[1]) if p.weight is None else p.weight
    bias = None if p.bias is None else p.bias.to(compute)
    h = F.group_norm(x.to(compute), p.num_groups, weight.to(compute), bias, p.eps).to(x.dtype)
    if p.scale is not None:
        h = h * (1 + spread(p.scale))
    if p.shift is not None:
        h = h + spread(p.shift)
    return F.silu(h) if p.activation else h


def gradients(run: Callable[[Problem], Tensor], p: Problem) -> dict[str, Tensor]:
    """The output of `run` and the gradients of everything that p holds, by name."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name in ("x", *NAMES)
        if (tensor := getattr(p, name)) is not None
    }
    y = run(replace(p, **leaves))
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True)
    )


def error(out: Tensor, truth: Tensor) -> float:
    out, truth = out.detach().double(), truth.detach()
    return float((out - truth).norm() / truth.norm().clamp_min(1e-300))


def check(run: Callable[[Problem], Tensor], p: Problem, *, ill_conditioned: float = 0.0) -> None:
    """Assert that run(p) and its gradients are at most twice as wrong as eager's.

    ill_conditioned: an absolute allowance for gradients that cancel to about zero.
    """
    truth = gradients(eager, p.to(torch.float64))
    usual, ours = gradients(eager, p), gradients(run, p)
    floor = 4 * torch.finfo(p.x.dtype).eps
    for name, reference in truth.items():
        assert ours[name].shape == reference.shape, name
        assert ours[name].dtype == usual[name].dtype, name
        limit = 2 * error(usual[name], reference) + floor
        if ill_conditioned:
            limit += ill_conditioned / max(float(reference.norm()), 1e-300)
        found = error(ours[name], reference)
        assert found <= limit, f"{name}: error {found:.3g}, limit {limit:.3g}"
