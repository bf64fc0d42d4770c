"""The autograd functions: what is saved for the backward, and what is computed again.

`GroupNormSiLUFunction` saves x, the statistics and the small tensors. `NormActConvFunction` is the
selective checkpoint: the convolution after it would save its input, which is here rewritten from x
just before the convolution's backward, so that neither saves an activation beyond x and no
convolution runs twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from resblock_bench.kernels import aten
from resblock_bench.kernels.dispatch import Plan
from resblock_bench.kernels.resample import Resample
from resblock_bench.kernels.spec import Modulation, Spec

Gradients = tuple[Tensor | None, ...]


def forward(
    x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    if plan.backend == "triton":
        from resblock_bench.kernels import launch

        return launch.forward(x, modulation, seed, spec, plan)
    return aten.forward(x, modulation, seed, spec)


def recompute(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    plan: Plan,
) -> Tensor:
    if plan.backend == "triton":
        from resblock_bench.kernels import launch

        return launch.recompute(x, mean, rstd, modulation, seed, spec, plan)
    return aten.recompute(x, mean, rstd, modulation, seed, spec)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    plan: Plan,
) -> tuple[Tensor, Gradients]:
    """dx and the gradients of the five modulation tensors."""
    # A gradient in another layout is converted once; read as it stands it would be misread.
    dy = dy.contiguous(memory_format=plan.memory_format)
    if plan.backend == "triton":
        from resblock_bench.kernels import launch

        dx, sums = launch.backward(dy, x, mean, rstd, modulation, seed, spec, plan)
    else:
        dx, sums = aten.backward(dy, x, mean, rstd, modulation, seed, spec)
    return dx, modulation.gradients(sums)


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
        plan: Plan,
    ) -> Tensor:
        modulation = Modulation(weight, bias, scale, shift, pre_shift)
        y, mean, rstd = forward(x, modulation, seed, spec, plan)
        ctx.save_for_backward(x, mean, rstd, seed, *modulation)
        ctx.spec, ctx.plan = spec, plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, mean, rstd, seed, *modulation = ctx.saved_tensors
        dx, gradients = backward(
            dy, x, mean, rstd, Modulation(*modulation), seed, ctx.spec, ctx.plan
        )
        return dx, *gradients, None, None, None


class Convolution(NamedTuple):
    """The constants of the convolution that follows the activation."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


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
        plan: Plan,
        convolution: Convolution,
        resample: Resample,
    ) -> Tensor:
        modulation = Modulation(weight, bias, scale, shift, pre_shift)
        y, mean, rstd = forward(x, modulation, seed, spec, plan)
        out = _convolve(resample.forward(y), kernel, kernel_bias, convolution)
        ctx.save_for_backward(x, mean, rstd, seed, kernel, *modulation)
        ctx.constants = spec, plan, convolution, resample, kernel_bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        x, mean, rstd, seed, kernel, *tensors = ctx.saved_tensors
        modulation = Modulation(*tensors)
        spec, plan, convolution, resample, has_bias = ctx.constants
        y = recompute(x, mean, rstd, modulation, seed, spec, plan)
        dy, dkernel, dkernel_bias = torch.ops.aten.convolution_backward(
            dout,
            resample.forward(y),
            kernel,
            [kernel.shape[0]] if has_bias else None,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            False,
            [0] * len(convolution.stride),
            convolution.groups,
            [True, ctx.needs_input_grad[6], has_bias and ctx.needs_input_grad[7]],
        )
        del y
        dx, gradients = backward(resample.backward(dy), x, mean, rstd, modulation, seed, spec, plan)
        return dx, *gradients, dkernel, dkernel_bias, *(None,) * 5


def _convolve(y: Tensor, kernel: Tensor, bias: Tensor | None, convolution: Convolution) -> Tensor:
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
