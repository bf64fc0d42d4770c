"""Calls of one kind, prepared once.

Which launches a call needs follows from the shapes, strides, dtypes and device of its tensors and
from its constants. A model makes the same few kinds of calls all the time, so what was found for
one is kept for the next.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch, launch, tuned
from .spec import Modulation, Spec, memory_format

T = TypeVar("T")

MOST = 4096
"""Kinds that are kept; before another they are all forgotten."""

PLAIN = (Tensor, torch.nn.Parameter)
# By a transform of torch.func that is active, or left over from one.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

_calls: dict[Any, Call] = {}
_residuals: dict[Any, launch.Residual] = {}


class Call:
    """The launches of one kind of call; None until they are prepared, with tensors of the kind."""

    def __init__(self, x: Tensor, spec: Spec) -> None:
        self.spec = spec
        self.strides = x.stride()
        self.layout = memory_format(x)
        self.forward: launch.Forward | None = None
        self.rewrite: launch.Rewrite | None = None
        self.backward: launch.Backward | None = None

    def prepare_forward(self, x: Tensor, rows: launch.Rows) -> launch.Forward:
        how = dispatch.launch_for("forward", x, self.spec.num_groups)
        self.forward = launch.Forward(x, Modulation(*rows), self.spec, how)
        return self.forward

    def prepare_rewrite(self, x: Tensor, rows: launch.Rows) -> launch.Rewrite:
        how = dispatch.rewrite_launch_for(x, self.spec.num_groups)
        self.rewrite = launch.Rewrite(x, Modulation(*rows), self.spec, how)
        return self.rewrite

    def prepare_backward(self, x: Tensor, rows: launch.Rows) -> launch.Backward:
        how = dispatch.launch_for("backward", x, self.spec.num_groups)
        self.backward = launch.Backward(x, Modulation(*rows), self.spec, how)
        return self.backward


def of(x: Tensor, rows: launch.Rows, spec: Spec, *others: Tensor | None) -> Call:
    """The kind of a valid call on plain, dense tensors.

    others: whatever else is passed to a launch and may be absent or of more than one dtype.
    """
    dtypes = [None if t is None else t.dtype for t in others]
    key = spec, *dtypes, *(kind(x, rows) or ())
    call = _calls.get(key)
    if call is None:
        call = keep(_calls, key, Call(x, spec))
    return call


def residual_of(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> launch.Residual:
    """The launch of (skip + h + bias)·scale, prepared."""
    of_bias = None if bias is None else bias.dtype
    key = h.shape, h.stride(), h.dtype, h.device, skip.dtype, of_bias, scale
    residual = _residuals.get(key)
    if residual is None:
        residual = keep(_residuals, key, launch.Residual(skip, h, scale))
    return residual


def kind(x: Tensor, rows: launch.Rows) -> list[Any] | None:
    """What the launches follow from beside the constants: of the tensors, and of the settings.

    None where one of the rows is a tensor of another kind, whose strides may mean nothing.
    """
    key = [x.shape, x.stride(), x.dtype, x.device, dispatch.settings, tuned.generation]
    for t in rows:
        if t is None:
            key.append(None)
        elif type(t) in PLAIN and t.layout is torch.strided and not is_wrapped(t):
            key.append((t.shape, t.stride(), t.dtype, t.device))
        else:
            return None
    return key


def keep(kept: dict[Any, T], key: Any, value: T) -> T:
    if len(kept) >= MOST:
        kept.clear()
    kept[key] = value
    return value


def plain(x: Tensor) -> bool:
    """Whether nobody is looking: no compiler, no tensor subclass, no dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
    )
