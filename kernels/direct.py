"""The shortest way for a call like an earlier one: on small maps the host is what takes the time.

What the first call of a kind went through is known for the next: its arguments are valid, Triton
takes it, its tensors need not be copied. So it goes to its prepared launches at once, through
autograd only where there is anything to differentiate. Whatever is not a plain call goes the usual
way (`op.py`): under a compiler, a transform or a mode, of subclasses, on another device than the
current one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import calls, dispatch, op
from .calls import Call
from .launch import Rows
from .launcher import current_device
from .spec import Gradients, Modulation, Spec, dense

_known: dict[Any, Call] = {}
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_Constants = tuple[int, float, str | None, float, torch.dtype]


def find(x: Tensor, rows: Rows, constants: _Constants) -> Call | None:
    """The call's kind, if an earlier one was of this kind and this one is plain.

    rows: the modulation. constants: groups, eps, activation, dropout's probability, out_dtype.
    """
    key = _key(x, rows, constants)
    return None if key is None else _known.get(key)


def remember(x: Tensor, modulation: Modulation, spec: Spec, activation: str | None) -> None:
    """The kind of a valid call, if Triton takes it as it is."""
    constants = (spec.num_groups, spec.eps, activation, spec.dropout_p, spec.out_dtype)
    key = _key(x, modulation, constants)
    if key is None or dispatch.choose_backend(x)[0] != "triton":
        return
    if dense(x) is x and all(
        t is d for t, d in zip(modulation, modulation.dense(), strict=True)
    ):  # fmt: skip
        call = calls.keep(_known, key, Call(x, spec))
        call.prepare_forward(x, modulation)


def _key(x: Tensor, rows: Rows, constants: _Constants) -> Any:
    """What a plain call is known by; None for another. No compiler traces this."""
    if (
        type(x) not in calls.PLAIN
        or _modes()
        or _transforms()
        or x.layout is not torch.strided
        or calls.is_wrapped(x)
    ):
        return None
    if x.is_cuda or dispatch.settings[2]:
        if x.get_device() != current_device():
            return None
    elif dispatch.settings[0] != "triton":
        return None
    groups, eps, activation, dropout_p, _ = constants
    # 1.0 and True are found where 1 is, and the checks tell them apart.
    if not (type(groups) is int and type(eps) is type(dropout_p) is float):
        return None
    if activation is not None and type(activation) is not str:
        return None
    kind = calls.kind(x, rows)
    return None if kind is None else (constants, *kind)


def run(call: Call, x: Tensor, rows: Rows, seed: Tensor | None) -> Tensor:
    """y of a call of the kind."""
    if not op.needs_autograd(x, rows):
        return call.forward(x, rows, seed)[0]  # type: ignore[misc]
    y: Tensor = _apply(x, *rows, seed, call)
    return y


class _DirectFunction(Function):
    """`op.GroupNormSiLUFunction` with prepared launches."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        pre_shift: Tensor | None,
        seed: Tensor | None,
        call: Call,
    ) -> Tensor:
        rows = (weight, bias, scale, shift, pre_shift)
        y, mean, rstd = call.forward(x, rows, seed)  # type: ignore[misc]
        # As the usual function does, since a checkpoint may run the one and then the other.
        ctx.save_for_backward(x, seed, *rows, mean, rstd)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, seed, *rows, mean, rstd = ctx.saved_tensors
        call: Call = ctx.call
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(dy) not in calls.PLAIN
            or _modes()
            or _transforms()
            or op.is_grad_batch(dy)
        ):
            return *_usual(dy, x, mean, rstd, seed, Modulation(*rows), call.spec), None, None
        if dy.stride() != call.strides:
            dy = dense(dy, call.layout)
        backward = call.backward or call.prepare_backward(x, rows)
        dx, gradients = backward(dy, x, mean, rstd, rows, seed)
        return dx, *gradients, None, None


# Without the look at transforms, which the key has had: a tenth of the forward's time.
_apply = super(Function, _DirectFunction).apply


def _usual(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    modulation: Modulation,
    spec: Spec,
) -> Gradients:
    """The backward under a compiler, a transform or a mode, or to be differentiated again."""

    def compute() -> Gradients:
        dx, gradients = op.backward(dy, x, (mean, rstd), modulation, seed, spec)
        return dx, *gradients

    return op.differentiated_once(compute, dy, (x, *modulation))
