"""The autograd functions: what is saved for the backward, and what is computed again.

`GroupNormSiLUFunction` saves x, the statistics and the small tensors. `NormActConvFunction` is the
selective checkpoint: the convolution after it would save its input, which is here rewritten from x
just before the convolution's backward, so that neither saves an activation beyond x and no
convolution runs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from resblock_bench.reference.checkpoint import under_transforms

from . import aten
from .dispatch import choose_backend, triton_installed
from .resample import Resample
from .spec import (
    GRADS_BATCHED,
    SECOND_DERIVATIVE,
    Gradients,
    Modulation,
    Spec,
    dense,
    memory_format,
    spread,
)

if triton_installed():
    from . import registry


def forward(
    x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what the implementation wants back beside x: Triton mean and rstd (N, G)."""
    if choose_backend(x)[0] == "aten":
        # Detached, here and in `backward`: autograd lets nobody change in place what a function
        # returns as a view, and these may be views of what only the function knows.
        return aten.forward(x, modulation, seed, spec).detach(), ()
    y, mean, rstd = registry.forward(x, *modulation, seed, *spec)
    return y, (mean, rstd)


def recompute(
    x: Tensor,
    statistics: tuple[Tensor, ...],
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
) -> Tensor:
    """The forward's output once more."""
    if not statistics:
        return aten.forward(x, modulation, seed, spec)
    return registry.rewrite(x, *statistics, *modulation, seed, *spec)


def backward(
    dy: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, ...],
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Gradients]:
    """dx and the gradients of the five modulation tensors."""
    # A gradient in another layout is converted once; read as it stands it would be misread.
    dy = dense(dy, memory_format(x))
    if not statistics:
        dx, sums = aten.backward(dy, x, modulation, seed, spec)
        gradients = modulation.gradients(sums)
        return dx.detach(), tuple(None if g is None else g.detach() for g in gradients)
    dx, *found = registry.backward(dy, x, *statistics, *modulation, seed, *spec)
    return dx, tuple(None if t is None else g for t, g in zip(modulation, found, strict=True))


def needs_autograd(x: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether anything may be differentiated through a call that no compiler traces."""
    if forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True  # torch.jit.trace compares what it finds with gradients and without
    return torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    )


class GroupNormSiLUFunction(Function):
    """y = dropout(act(norm(x + pre_shift)·γ' + β')); saves x and what is small."""

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
        spec: Spec,
    ) -> Tensor:
        modulation = Modulation(weight, bias, scale, shift, pre_shift)
        y, statistics = forward(x, modulation, seed, spec)
        ctx.save_for_backward(x, seed, *modulation, *statistics)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, seed, *rest = ctx.saved_tensors
        modulation, statistics = Modulation(*rest[:5]), tuple(rest[5:])

        def compute() -> Gradients:
            dx, gradients = backward(dy, x, statistics, modulation, seed, ctx.spec)
            return dx, *gradients

        return *differentiated_once(compute, dy, (x, *modulation)), None, None


class Convolution(NamedTuple):
    """The constants of the convolution that follows the activation."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Kernel(NamedTuple):
    """A convolution that is its parameters alone."""

    weight: Tensor
    bias: Tensor | None
    constants: Convolution

    def convolve(self, h: Tensor) -> Tensor:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[h.dim() - 3]
        return convolution(h, self.weight, self.bias, *self.constants)


class NormActConvFunction(Function):
    """conv(resample(y)) with y as above; saves what the operator saves, and not y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        pre_shift: Tensor | None,
        kernel: Tensor,
        kernel_bias: Tensor | None,
        seed: Tensor | None,
        spec: Spec,
        convolution: Convolution,
        resample: Resample,
    ) -> Tensor:
        modulation = Modulation(weight, bias, scale, shift, pre_shift)
        y, statistics = forward(x, modulation, seed, spec)
        out = convolve(resample.forward(y), kernel, kernel_bias, convolution)
        ctx.save_for_backward(x, seed, kernel, *modulation, *statistics)
        ctx.spec = spec
        ctx.convolution, ctx.resample, ctx.has_bias = convolution, resample, kernel_bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        x, seed, kernel, *rest = ctx.saved_tensors
        modulation, statistics = Modulation(*rest[:5]), tuple(rest[5:])
        convolution: Convolution = ctx.convolution
        resample: Resample = ctx.resample

        def compute() -> Gradients:
            y = recompute(x, statistics, modulation, seed, ctx.spec)
            dy, dkernel, dkernel_bias = torch.ops.aten.convolution_backward(
                dout,
                resample.forward(y),
                kernel,
                [kernel.shape[0]] if ctx.has_bias else None,
                convolution.stride,
                convolution.padding,
                convolution.dilation,
                False,
                [0] * len(convolution.stride),
                convolution.groups,
                [True, ctx.needs_input_grad[6], ctx.has_bias and ctx.needs_input_grad[7]],
            )
            del y
            dx, gradients = backward(
                resample.backward(dy, x.shape), x, statistics, modulation, seed, ctx.spec
            )
            return dx, *gradients, dkernel, dkernel_bias

        return *differentiated_once(compute, dout, (x, *modulation, kernel)), *(None,) * 4


def residual_add(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """(skip + h + bias)·scale in one pass, where `choose_backend` says Triton."""
    if under_transforms():
        y = skip + h if bias is None else skip + h + spread(bias[None], h)
        return y * scale
    h = dense(h)
    return registry.residual_add(dense(skip, memory_format(h)), h, bias, scale)


# What is_grads_batched=True passes to a backward.
is_grad_batch = torch._C._functorch.is_legacy_batchedtensor


class _Underivable(Function):
    """Computes gradients, and raises where a second derivative is taken through them."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Gradients], *inputs: Tensor | None) -> Gradients:
        return compute()

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Gradients:
        raise RuntimeError(SECOND_DERIVATIVE)


def differentiated_once(
    compute: Callable[[], Gradients], dy: Tensor, inputs: tuple[Tensor | None, ...]
) -> Gradients:
    """compute(), tied to dy and `inputs` so that a second derivative raises.

    Without the tie the gradients would count as constants in a graph that is built with
    create_graph=True, and a gradient penalty would silently be wrong.
    """
    if not torch.compiler.is_compiling() and is_grad_batch(dy):
        raise NotImplementedError(GRADS_BATCHED)
    if not torch.is_grad_enabled():
        return compute()
    tied: Gradients = _Underivable.apply(compute, dy, *inputs)
    return tied


def convolve(y: Tensor, kernel: Tensor, bias: Tensor | None, convolution: Convolution) -> Tensor:
    return torch.convolution(
        y,
        kernel,
        bias,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        False,
        [0] * len(convolution.stride),
        convolution.groups,
    )
