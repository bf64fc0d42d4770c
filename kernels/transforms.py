"""The operator under torch.func: vmap, grad, vjp and jacrev, and their nestings.

torch.func wants an autograd function that is written without state of its own, and a rule for
vmap. PyTorch binds the arguments of such a function by name on every call, which costs more host
time than a small launch, so this form serves under transforms only; `op.py` has the usual one.

vmap over B calls makes one of them. Their samples become B·N samples where all share weight and
bias; their channels become B·C channels in B·G groups where each has its own, or its own gradient
of them. With dropout every call is made for itself, so that its mask is that of its seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import op
from .spec import (
    FORWARD_MODE,
    SECOND_DERIVATIVE,
    Gradients,
    Modulation,
    Spec,
    dense,
)

Results = tuple[tuple[Tensor, ...], tuple[int, ...]]  # tensors, and which dimension is vmap's


def group_norm_silu(x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec) -> Tensor:
    """y = dropout(act(norm(x + pre_shift)·γ' + β'))."""
    y: Tensor = _Forward.apply(x, *modulation, seed, spec)[0]
    return y


class _Forward(Function):
    """x, five modulation tensors, seed, spec → y, and the statistics that its backward wants."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        x, *tensors, seed, spec = arguments
        y, statistics = op.forward(dense(x), Modulation(*tensors).dense(), seed, spec)
        return y, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.spec = inputs
        statistics = output[1:]
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(*tensors, *statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Gradients:
        tensors = ctx.saved_tensors
        found = iter(_Backward.apply(dy, *tensors[:7], ctx.spec, *tensors[7:]))
        return *(None if t is None else next(found) for t in tensors[:6]), None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Results:
        seed, spec = arguments[6:]
        if seed is not None:
            return _one_by_one(_Forward, info.batch_size, in_dims, arguments)
        own_affine = in_dims[1] is not None or in_dims[2] is not None
        calls = _Calls(info.batch_size, as_channels=own_affine)
        x, weight, bias, *rows = map(calls.batched, arguments[:6], in_dims[:6])
        affine = map(calls.affine, (weight, bias)) if own_affine else arguments[1:3]
        out = _Forward.apply(
            calls.join(x), *affine, *map(calls.join, rows), None, calls.spec(spec)
        )  # fmt: skip
        return calls.split(out)


class _Backward(Function):
    """dy, x, five modulation tensors, seed, spec, statistics → the gradients of those present."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        dy, x, *tensors, seed, spec = arguments[:9]
        modulation = Modulation(*tensors).dense()
        dx, gradients = op.backward(dy, dense(x), arguments[9:], modulation, seed, spec)
        return dx, *(g for g in gradients if g is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Results:
        seed, spec = arguments[7:9]
        if seed is not None:
            return _one_by_one(_Backward, info.batch_size, in_dims, arguments)
        # The gradients of weight and bias are summed over the samples of one call, not of all.
        affine = [t is not None for t in arguments[2:4]]
        calls = _Calls(info.batch_size, as_channels=any(affine))
        tensors = map(calls.batched, arguments[:7], in_dims[:7])
        dy, x, weight, bias, *rows = tensors
        statistics = map(calls.batched, arguments[9:], in_dims[9:])
        out = _Backward.apply(
            calls.join(dy), calls.join(x), calls.affine(weight), calls.affine(bias),
            *map(calls.join, rows), None, calls.spec(spec), *map(calls.join, statistics),
        )  # fmt: skip
        return calls.split(out, affine=range(1, 1 + sum(affine)))


class _Calls:
    """B calls as one, of B·N samples or of B·C channels."""

    def __init__(self, B: int, as_channels: bool) -> None:
        self.B, self.dim = B, int(as_channels)

    def batched(self, t: Tensor | None, in_dim: int | None) -> Tensor | None:
        """(B, …)"""
        if t is None:
            return None
        return t.expand(self.B, *t.shape) if in_dim is None else t.movedim(in_dim, 0)

    def join(self, t: Tensor | None) -> Tensor | None:
        """(B, N, C, …) → (B·N, C, …) or (N, B·C, …)"""
        if t is None:
            return None
        return t.transpose(0, 1).flatten(1, 2) if self.dim else t.flatten(0, 1)

    def affine(self, t: Tensor | None) -> Tensor | None:
        """(B, C) → (B·C,)"""
        return None if t is None else t.flatten()

    def spec(self, spec: Spec) -> Spec:
        return spec._replace(num_groups=self.B * spec.num_groups) if self.dim else spec

    def split(self, joined: tuple[Tensor, ...], affine: range = range(0)) -> Results:
        """Each with its dimension B again, and which that is. `affine`: which are (B·C,)."""
        dims = tuple(0 if i in affine else self.dim for i in range(len(joined)))
        pairs = zip(joined, dims, strict=True)
        return tuple(t.unflatten(d, (self.B, t.shape[d] // self.B)) for t, d in pairs), dims


def _one_by_one(
    function: type[Function], B: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Results:
    def call(b: int) -> tuple[Tensor, ...]:
        pairs = zip(arguments, in_dims, strict=True)
        out: tuple[Tensor, ...] = function.apply(
            *(a.select(d, b) if isinstance(d, int) else a for a, d in pairs)
        )
        return out

    stacked = tuple(map(torch.stack, zip(*map(call, range(B)), strict=True)))
    return stacked, (0,) * len(stacked)
