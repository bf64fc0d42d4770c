"""The operator as a function: checks its arguments and draws the dropout seed.

y = dropout(act(GroupNorm(x + pre_shift)·(1 + scale) + shift))
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from resblock_bench.kernels import transforms
from resblock_bench.kernels.dispatch import choose_backend, launch_for, triton_installed
from resblock_bench.kernels.op import (
    Convolution,
    GroupNormSiLUFunction,
    NormActConvFunction,
    convolve,
)
from resblock_bench.kernels.resample import Resample
from resblock_bench.kernels.spec import Modulation, Spec, dense, memory_format
from resblock_bench.kernels.tiers import Direction, ceil_div
from resblock_bench.reference.checkpoint import under_transforms

_HAS_TRITON = triton_installed()
if _HAS_TRITON:
    from resblock_bench.kernels import direct

Activation = Literal["silu"] | None


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    pre_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Group norm, adaptive scale and shift, SiLU and dropout in one pass.

    Formula, with mean μ and variance σ² over each group of C/G channels and all positions:

        x̂ = (x + pre_shift − μ) / √(σ² + eps)
        z = (x̂·weight + bias)·(1 + scale) + shift
        y = dropout(z·sigmoid(z))

    Arguments:

    - `x`: (N, C, *spatial), 1 to 3 spatial dimensions, contiguous or channels-last, floating point.
    - `num_groups`: G, a divisor of C.
    - `weight`, `bias`: (C,), any floating dtype.
    - `scale`, `shift`, `pre_shift`: (N, C), any floating dtype and strides; each may be absent,
      which means zero.
    - `eps`: added to the variance.
    - `activation`: "silu", or None for y = dropout(z).
    - `dropout_p`, `training`: probability of zeroing an element, scaled by 1/(1 − p); none unless
      training. The mask follows from a seed drawn from torch's generator of x's device, so
      `torch.manual_seed` fixes it; it is drawn again in the backward and never stored.

    Returns y in x's shape, dtype and layout. Statistics and modulation are computed in fp32 (fp64
    for fp64 x); Triton keeps everything between in fp32, ATen on the CPU rounds the intermediate
    activations of 16-bit x to x's dtype. Only x, Triton's fp32 mean and rstd (N, G) and the small
    tensors are kept for the backward. Differentiable once: a second derivative raises.

    Errors: ValueError, or TypeError for dtypes, naming what was received and what is allowed.

    Source: Wu and He, Group Normalization (arXiv:1803.08494); Nichol and Dhariwal, Improved
    Denoising Diffusion Probabilistic Models (arXiv:2102.09672), section 3.
    """
    rows = (weight, bias, scale, shift, pre_shift)
    if _HAS_TRITON and isinstance(x, Tensor) and type(training) is bool:
        p = dropout_p if training else 0.0
        constants = (num_groups, eps, activation, p, x.dtype)
        call = direct.find(x, rows, constants)
        if call is not None:
            return direct.run(call, x, rows, _seed(x, p) if p else None)
    modulation = Modulation(*rows)
    seed, spec = _prepare(x, num_groups, modulation, eps, activation, dropout_p, training, x.dtype)
    if _HAS_TRITON:
        direct.remember(x, modulation, spec, activation)
    return _normalise(x, modulation, seed, spec)


def norm_act_conv(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    pre_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
    resample: Literal["up", "down"] | None = None,
    conv_bias: bool = True,
) -> Tensor:
    """conv(resample(group_norm_silu(x, …))) that keeps no activation but x for the backward.

    The convolution's input is rewritten from x and the saved statistics just before the
    convolution's backward; the convolution itself is not run again. Arguments as in
    `group_norm_silu`; `conv` is a zero-padded Conv1d, Conv2d or Conv3d, called by its parameters,
    so its hooks do not run; `resample` doubles ("up", nearest) or halves ("down", mean) the
    resolution before it; `conv_bias=False` leaves the convolution's bias to the caller. Under
    autocast the activation is written in autocast's dtype.
    """
    if conv.transposed:
        raise TypeError(
            f"conv is a {type(conv).__name__}; expected Conv1d, Conv2d or Conv3d. Call "
            "group_norm_silu and the transposed convolution one after the other."
        )
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"conv pads with padding_mode={conv.padding_mode!r}, padding={conv.padding!r}; allowed "
            "is 'zeros' with numbers. Call group_norm_silu and the convolution one after the other."
        )
    dtype = conv.weight.dtype
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    modulation = Modulation(weight, bias, scale, shift, pre_shift)
    seed, spec = _prepare(x, num_groups, modulation, eps, activation, dropout_p, training, dtype)
    constants = Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
    kernel = conv.weight.to(dtype)
    kernel_bias = conv.bias.to(dtype) if conv_bias and conv.bias is not None else None
    if under_transforms():
        y = transforms.group_norm_silu(x, modulation, seed, spec)
        return convolve(Resample(resample).forward(y), kernel, kernel_bias, constants)
    out: Tensor = NormActConvFunction.apply(
        dense(x), *modulation.dense(), kernel, kernel_bias, seed, spec, constants,
        Resample(resample),
    )  # fmt: skip
    return out


def explain(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    pre_shift: Tensor | None = None,
) -> str:
    """Which implementation, tier and launch `group_norm_silu` takes for this call, and why."""
    _check(x, num_groups, Modulation(weight, bias, scale, shift, pre_shift), 0.0, "silu")
    backend, reason = choose_backend(x)
    layout = str(memory_format(x)).removeprefix("torch.").removesuffix("_format")
    dense = x.is_contiguous() or memory_format(x) != torch.contiguous_format
    lines = [
        f"group_norm_silu {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}, "
        f"{num_groups} groups of {x.shape[1] // num_groups} channels",
        f"  layout:   {layout}" + ("" if dense else " (x is strided: copied once)"),
        f"  backend:  {backend}: {reason}",
    ]
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions if backend == "triton" else ():
        launch = launch_for(direction, x, num_groups)
        programs = launch.programs(len(x) * ceil_div(x.shape[1], launch.slab))
        lines.append(
            f"  {direction + ':':<9} tier {launch.tier}: {launch.reason}; {programs} programs, "
            f"tile {launch.block_c}×{launch.block_hw}, {launch.num_warps} warps"
        )
    return "\n".join(lines)


def _normalise(x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec) -> Tensor:
    if under_transforms():
        return transforms.group_norm_silu(x, modulation, seed, spec)
    y: Tensor = GroupNormSiLUFunction.apply(dense(x), *modulation.dense(), seed, spec)
    return y


def _prepare(
    x: Tensor,
    num_groups: int,
    modulation: Modulation,
    eps: float,
    activation: Activation,
    dropout_p: float,
    training: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Spec]:
    _check(x, num_groups, modulation, dropout_p, activation)
    dropout_p = dropout_p if training else 0.0
    spec = Spec(num_groups, eps, activation is not None, dropout_p, out_dtype)
    return _seed(x, dropout_p), spec


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Of dropout, if there is any."""
    if not dropout_p > 0:
        return None
    # On x's device, so that drawing it neither waits for the device nor breaks graph capture,
    # and checkpoints that restore the generator draw the same one again.
    return torch.randint(2**63 - 1, (), device=x.device)


def _check(
    x: Tensor,
    num_groups: int,
    modulation: Modulation,
    dropout_p: float,
    activation: Activation,
) -> None:
    if x.dim() not in (3, 4, 5):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (N, C, *spatial) with 1 to 3 spatial "
            "dimensions."
        )
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point tensor. Convert it first.")
    N, C = x.shape[:2]
    if num_groups < 1 or C % num_groups:
        raise ValueError(
            f"{C} channels cannot be divided into {num_groups} groups; num_groups must be a "
            f"positive divisor of {C}."
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}; allowed are 'silu' and None.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; allowed is 0 ≤ p < 1.")
    expected = ((C,), (C,), (N, C), (N, C), (N, C))
    for name, tensor, shape in zip(Modulation._fields, modulation, expected, strict=True):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} for x of shape "
                f"{tuple(x.shape)}."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them.")
