"""A fused module against a float64 copy of what it was, on random input.

Outputs and gradients of both, and of what it was in its own precision, with dropout switched off:

    error(t) = ‖t − t64‖ / ‖t64‖ ≤ max(2·error(t of what it was), 2e-5, 4 roundings)

A gradient far smaller than the largest one may be what is left of sums that cancel: it is measured
against a tenth of that one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .family import Found, is_fused, restore
from .norm import no_norm

_SEED = 0
_NEGLIGIBLE = 0.1


@torch.inference_mode(False)
def original(module: nn.Module) -> nn.Module:
    """A copy of what the module was before it was fused."""
    was = _copied(module)
    for part in was.modules():
        if is_fused(part):
            restore(part)
    return was


def _copied(module: nn.Module) -> nn.Module:
    """What weight_norm, spectral_norm and pruning compute before every forward, nobody can copy:
    it is cut off from what it was computed from, until the next forward."""
    computed = {
        id(t): t.detach().clone()
        for part in module.modules()
        for t in vars(part).values()
        if isinstance(t, Tensor) and not t.is_leaf
    }
    return copy.deepcopy(module, computed)


@torch.inference_mode(False)
def wrong(module: nn.Module, was: nn.Module, found: Found) -> str | None:
    """What is wrong with a fused module that was `was`; None where nothing is."""
    if found.inputs is None:
        return "it cannot be verified: its family knows no input for it"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)  # torch.manual_seed is every device's
            inputs = found.inputs(module)
        truth = _step(_in_float64(was), inputs, torch.float64)
        usual = _step(was, inputs)
    except Exception as error:  # whatever a module that nobody here wrote raises
        return f"it cannot be verified: {type(error).__name__}: {error}"
    try:
        fused = _step(_copied(module), inputs)
    except Exception as error:
        return f"verified and found wrong: {type(error).__name__}: {error}"
    largest = max(float(t.norm()) for name, t in truth.items() if name != "the output")
    for name, exact in truth.items():
        if name not in fused:
            return f"verified and found wrong: {name} is missing"
        least = 0.0 if name == "the output" else _NEGLIGIBLE * largest
        scale = max(float(exact.norm()), least) or 1.0
        limit = max(
            2 * float((usual[name].double() - exact).norm()) / scale,
            2e-5,
            4 * torch.finfo(fused[name].dtype).eps,
        )
        off = float((fused[name].double() - exact).norm()) / scale
        if not off <= limit:
            return f"verified and found wrong: {name} is off by {off:.2g}, allowed {limit:.2g}"
    return None


def _in_float64(module: nn.Module) -> nn.Module:
    """A copy of it. A norm that casts its input to fp32 would not take weights in float64."""
    module = _copied(module).double()
    for part in module.modules():
        if isinstance(part, nn.GroupNorm) and no_norm(part) is None:
            part.__class__ = nn.GroupNorm
    return module


def _step(
    module: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The output and the gradients of inputs and parameters, by name, of a module in eval mode.

    dtype: of the inputs; None leaves them as they are.
    """
    parameters = {name: p.requires_grad_() for name, p in module.named_parameters()}
    leaves = [
        t.to(dtype or t.dtype).requires_grad_() if isinstance(t, Tensor) else t for t in inputs
    ]
    module.eval()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        y = module(*leaves)
        generator = torch.Generator().manual_seed(_SEED)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        named = parameters | dict(_named(leaves))
        gradients = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    found = {f"the gradient of {n}": g for n, g in zip(named, gradients, strict=True)}
    return {"the output": y.detach()} | {n: g for n, g in found.items() if g is not None}


def _named(leaves: list[Any]) -> Iterator[tuple[str, Tensor]]:
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            yield f"input {number}", leaf
