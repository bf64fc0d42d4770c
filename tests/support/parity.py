"""A model against a fused copy of it: outputs and gradients, each held to a float64 model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .openai_classes import GroupNorm32

NEGLIGIBLE = 1e-2
"""A gradient of less than this of the largest one is measured against that share of it."""


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """With weights of which every layer shows: a fresh block is blind to its zeroed branch."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.7 / max(p[0].numel(), 2) ** 0.5))
    return model


def drawn(*shapes: Sequence[int], seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def step(
    model: nn.Module, inputs: Sequence[Tensor], *, autocast: bool = False
) -> dict[str, Tensor]:
    """The output and the gradients of inputs and parameters, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    how = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    torch.manual_seed(2)
    with how:
        y = model(*leaves)
    g = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=g).to(y.dtype)
    names = [f"input {i}" for i in range(len(leaves))]
    named = dict(zip(names, leaves, strict=True))
    named |= {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return {"y": y.detach()} | {n: t for n, t in zip(named, found, strict=True) if t is not None}


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another precision. The norms of OpenAI's classes stay in fp32, as theirs do, or
    become PyTorch's, since theirs take no weights in float64."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if type(m) is GroupNorm32]
    model.to(dtype)
    for norm in norms:
        if dtype == torch.float64:
            norm.__class__ = nn.GroupNorm
        else:
            norm.float()
    return model


def check_parity(
    model: nn.Module,
    fused: nn.Module,
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    autocast: bool = False,
) -> None:
    """Assert that the fused model is at most twice as wrong as the model, or 2e-5 in fp32."""
    truth = step(cast(model, torch.float64), [t.double() for t in inputs])
    given = [t.to(dtype) for t in inputs]
    usual = step(cast(model, dtype), given, autocast=autocast)
    ours = step(cast(fused, dtype), given, autocast=autocast)
    assert list(ours) == list(usual)
    low = dtype if not autocast else torch.bfloat16
    floor = 2e-5 if low == torch.float32 else 4 * torch.finfo(low).eps
    largest = max(float(t.norm()) for name, t in truth.items() if name != "y")
    for name, exact in truth.items():
        assert ours[name].dtype == usual[name].dtype, name
        scale = max(float(exact.norm()), 0.0 if name == "y" else NEGLIGIBLE * largest)
        off = float((ours[name].double() - exact).norm()) / scale
        limit = max(2 * float((usual[name].double() - exact).norm()) / scale, floor)
        assert off <= limit, f"{name}: off by {off:.3g}, limit {limit:.3g}"
