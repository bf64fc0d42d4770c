"""The Triton operators in PyTorch's registry: `torch.ops.resblock_bench.*`.

    group_norm_silu           → y, mean, rstd             differentiable
    group_norm_silu_rewrite   → y
    group_norm_silu_backward  → dx, dweight, dbias, dscale, dshift, dpre_shift (empty where absent)
    residual_add              → y                         differentiable

torch.compile, torch.export and fake tensors see them as one node each, with shapes from the fake
implementations. On plain tensors the functions of this module launch at once: a call through the
registry, with its autograd, costs several times as much host time as the launch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import calls
from .calls import plain
from .dispatch import triton_obstacle
from .spec import SECOND_DERIVATIVE, Modulation, Spec, dense, memory_format

_CALL = (
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? pre_shift, Tensor? seed, "
    "int num_groups, float eps, bool activation, float dropout_p, ScalarType out_dtype"
)
_LIBRARY = torch.library.Library("resblock_bench", "FRAGMENT")


def forward(x: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd."""
    if plain(x):
        return _forward(x, *call)
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.resblock_bench.group_norm_silu(x, *call)
    return out


def rewrite(x: Tensor, mean: Tensor, rstd: Tensor, *call: Any) -> Tensor:
    """y once more."""
    if plain(x):
        return _rewrite(x, mean, rstd, *call)
    y: Tensor = torch.ops.resblock_bench.group_norm_silu_rewrite(x, mean, rstd, *call)
    return y


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *call: Any) -> tuple[Tensor, ...]:
    """dx and five gradients, empty where their tensor is absent. dy has the layout of x."""
    if plain(x):
        return _backward(dy, x, mean, rstd, *call)
    out: tuple[Tensor, ...] = torch.ops.resblock_bench.group_norm_silu_backward(
        dy, x, mean, rstd, *call
    )
    return out


def residual_add(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(skip + h + bias)·scale. skip has the layout of h."""
    if plain(h):
        added: Tensor = _ResidualAdd.apply(skip, h, bias, scale)
        return added
    y: Tensor = torch.ops.resblock_bench.residual_add(skip, h, bias, scale)
    return y


def _split(call: tuple[Any, ...]) -> tuple[Modulation, Tensor | None, Spec]:
    return Modulation(*call[:5]).dense(), call[5], Spec(*call[6:])


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of x. Raises ValueError for another shape: kernels know only that of x."""
    if t.shape != x.shape:
        raise ValueError(f"expected shape {tuple(x.shape)}, received {tuple(t.shape)}")
    return dense(t, memory_format(x))


# The implementations. Triton launches on the current device, whatever x's is.


def _forward(x: Tensor, *call: Any, own_words: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    x = dense(x)
    modulation, seed, spec = _split(call)
    with torch.cuda.device_of(x):
        kind = calls.of(x, modulation, spec, seed)
        forward = kind.forward or kind.prepare_forward(x, modulation)
        return forward(x, modulation, seed, own_words=own_words)


def _rewrite(x: Tensor, mean: Tensor, rstd: Tensor, *call: Any) -> Tensor:
    _check(x)
    x = dense(x)
    modulation, seed, spec = _split(call)
    with torch.cuda.device_of(x):
        kind = calls.of(x, modulation, spec, seed, mean, rstd)
        rewrite = kind.rewrite or kind.prepare_rewrite(x, modulation)
        return rewrite(x, mean, rstd, modulation, seed)


def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *call: Any, own_words: bool = False
) -> tuple[Tensor, ...]:
    _check(x)
    x = dense(x)
    modulation, seed, spec = _split(call)
    with torch.cuda.device_of(x):
        kind = calls.of(x, modulation, spec, seed, mean, rstd, dy)
        backward = kind.backward or kind.prepare_backward(x, modulation)
        dx, gradients = backward(_like(dy, x), x, mean, rstd, modulation, seed, own_words=own_words)
    return dx, *(_empty(x) if g is None else g for g in gradients)


def _residual(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    _check(h)
    h = dense(h)
    with torch.cuda.device_of(h):
        skip = _like(skip, h)
        return calls.residual_of(skip, h, bias, scale)(skip, h, bias)


def _check(x: Tensor) -> None:
    obstacle = triton_obstacle(x)
    if obstacle is not None:
        raise RuntimeError(
            f"torch.ops.resblock_bench runs in Triton, and {obstacle}. Call "
            "resblock_bench.kernels.group_norm_silu, which runs everywhere."
        )


def _empty(x: Tensor) -> Tensor:
    return torch.empty(0, device=x.device)


def _fake_forward(x: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    spec = _split(call)[2]
    mean = x.new_empty((x.shape[0], spec.num_groups), dtype=torch.float32)
    return torch.empty_like(dense(x), dtype=spec.out_dtype), mean, torch.empty_like(mean)


def _fake_rewrite(x: Tensor, mean: Tensor, rstd: Tensor, *call: Any) -> Tensor:
    return torch.empty_like(dense(x), dtype=_split(call)[2].out_dtype)


def _fake_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *call: Any
) -> tuple[Tensor, ...]:
    rows = _split(call)[0]
    gradients = (_empty(x) if t is None else t.new_empty(t.shape) for t in rows)
    return torch.empty_like(dense(x)), *gradients


def _fake_residual(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(dense(h), dtype=torch.promote_types(skip.dtype, h.dtype))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *call = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, *call[:6])
    ctx.spec = call[6:]


def _forward_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, mean, rstd, *tensors = ctx.saved_tensors
    dx, *gradients = torch.ops.resblock_bench.group_norm_silu_backward(
        dy, x, mean, rstd, *tensors, *ctx.spec
    )
    rows = (None if t is None else g for t, g in zip(tensors, gradients, strict=False))
    return dx, *rows, None, *(None,) * len(ctx.spec)


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        _setup_residual(ctx, (skip, h, bias, scale), h)
        return _residual(skip, h, bias, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _residual_gradients(ctx, dy)


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in tensors]
    ctx.layout = memory_format(tensors[1])


def _residual_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    of_skip, of_h, of_bias = ctx.dtypes
    dh = dense(dy, ctx.layout)
    if ctx.scale != 1.0:
        dh = dh * ctx.scale
    dbias = None
    if of_bias is not None and ctx.needs_input_grad[2]:
        dbias = dh.sum((0, *range(2, dy.dim())), dtype=torch.float32).to(of_bias)
    return dh.to(of_skip), dh.to(of_h), dbias, None


def _underivable(ctx: Any, *_: Any) -> None:
    raise RuntimeError(SECOND_DERIVATIVE)


def _define(name: str, schema: str, implementation: Any, fake: Any) -> None:
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"resblock_bench::{name}", fake, lib=_LIBRARY)


# Whoever calls the registry may be a compiler that records the launches (`words`).
_define(
    "group_norm_silu",
    f"(Tensor x, {_CALL}) -> (Tensor, Tensor, Tensor)",
    partial(_forward, own_words=True),
    _fake_forward,
)
_define(
    "group_norm_silu_rewrite",
    f"(Tensor x, Tensor mean, Tensor rstd, {_CALL}) -> Tensor",
    _rewrite,
    _fake_rewrite,
)
_define(
    "group_norm_silu_backward",
    f"(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_CALL}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(_backward, own_words=True),
    _fake_backward,
)
_define(
    "residual_add",
    "(Tensor skip, Tensor h, Tensor? bias, float scale) -> Tensor",
    _residual,
    _fake_residual,
)
for _name, _gradients, _setup in (
    ("group_norm_silu", _forward_gradients, _setup_forward),
    ("group_norm_silu_rewrite", _underivable, None),
    ("group_norm_silu_backward", _underivable, None),
    ("residual_add", _residual_gradients, _setup_residual),
):
    torch.library.register_autograd(
        f"resblock_bench::{_name}", _gradients, setup_context=_setup, lib=_LIBRARY
    )
