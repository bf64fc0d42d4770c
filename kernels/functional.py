"""The operator as a function: checks its arguments and draws the dropout seed.

y = dropout(act(GroupNorm(x + pre_shift)·(1 + scale) + shift))
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from resblock_bench.reference import arguments
from resblock_bench.reference.checkpoint import under_transforms

from . import aten, transforms, versions
from .dispatch import choose_backend, launch_for, triton_installed
from .op import (
    Convolution,
    GroupNormSiLUFunction,
    Kernel,
    NormActConvFunction,
    convolve,
    needs_autograd,
)
from .resample import Resample
from .spec import Modulation, Spec, dense, memory_format
from .tiers import Direction, ceil_div

_HAS_TRITON = triton_installed()
if _HAS_TRITON:
    from . import direct

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

    - `x`: (N, C, *spatial), 1 to 3 spatial dimensions, floating point, with any strides: what is
      neither contiguous nor channels-last is copied once.
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
    tensors are kept for the backward. Differentiable once: a second derivative raises. Works under
    torch.func's vmap, grad, vjp and jacrev.

    Errors: ValueError, or TypeError for values of another kind, naming what was received and what
    is allowed.

    Source: Wu and He, Group Normalization (arXiv:1803.08494); Nichol and Dhariwal, Improved
    Denoising Diffusion Probabilistic Models (arXiv:2102.09672), section 3.
    """
    rows = (weight, bias, scale, shift, pre_shift)
    kept = _HAS_TRITON and not torch.compiler.is_compiling()
    if kept and isinstance(x, Tensor) and type(training) is bool:
        p = dropout_p if training else 0.0
        call = direct.find(x, rows, (num_groups, eps, activation, p, x.dtype))
        if call is not None:
            return direct.run(call, x, rows, _seed(x, p) if p else None)
    modulation = Modulation(*rows)
    _check(x, num_groups, modulation)
    seed, spec = _constants(x, num_groups, eps, activation, dropout_p, training, x.dtype)
    if under_transforms():
        return transforms.group_norm_silu(x, modulation, seed, spec)
    if kept:
        direct.remember(x, modulation, spec, activation)
    if not (
        torch.compiler.is_compiling()
        or needs_autograd(x, modulation)
        or choose_backend(x)[0] == "triton"
    ):
        return aten.forward(dense(x), modulation.dense(), seed, spec)
    y: Tensor = GroupNormSiLUFunction.apply(dense(x), *modulation.dense(), seed, spec)
    return y


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
    autocast the activation is written in autocast's dtype. Under torch.func's transforms the three
    are called one after the other, and the convolution keeps its input.
    """
    if not isinstance(conv, _CONVOLUTIONS) or conv.transposed:
        raise TypeError(
            f"conv is {arguments.received(conv)}; expected Conv1d, Conv2d or Conv3d. Call "
            "group_norm_silu and the other module one after the other."
        )
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"conv pads with padding_mode={conv.padding_mode!r}, padding={conv.padding!r}; allowed "
            "is 'zeros' with numbers. Call group_norm_silu and the convolution one after the other."
        )
    arguments.flags("norm_act_conv", conv_bias=conv_bias)
    constants = Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
    kernel = Kernel(conv.weight, conv.bias if conv_bias else None, constants)
    return norm_act_kernel(
        x, num_groups, weight, bias, kernel, scale, shift, pre_shift=pre_shift, eps=eps,
        activation=activation, dropout_p=dropout_p, training=training, resample=resample,
    )  # fmt: skip


def norm_act_kernel(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    kernel: Kernel,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    pre_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
    resample: Literal["up", "down"] | None = None,
) -> Tensor:
    """`norm_act_conv` with the convolution's parameters instead of its module."""
    arguments.one_of("norm_act_conv", ("up", "down", None), resample=resample)
    modulation = Modulation(weight, bias, scale, shift, pre_shift)
    _check(x, num_groups, modulation)
    spatial, constants = x.dim() - 2, kernel.constants
    channels = kernel.weight.shape[1] * constants.groups
    if kernel.weight.dim() != x.dim() or channels != x.shape[1]:
        raise ValueError(
            f"conv is a Conv{kernel.weight.dim() - 2}d of {channels} channels; expected "
            f"Conv{spatial}d of {x.shape[1]} channels for x of shape {tuple(x.shape)}."
        )
    if kernel.weight.device != x.device:
        raise ValueError(
            f"conv is on {kernel.weight.device} and x on {x.device}; move one of them."
        )
    dtype = kernel.weight.dtype
    device = x.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    seed, spec = _constants(x, num_groups, eps, activation, dropout_p, training, dtype)
    cast = kernel.weight.to(dtype)
    cast_bias = None if kernel.bias is None else kernel.bias.to(dtype)
    if under_transforms():
        y = transforms.group_norm_silu(x, modulation, seed, spec)
        return convolve(Resample(resample).forward(y), cast, cast_bias, constants)
    out: Tensor = NormActConvFunction.apply(
        dense(x), *modulation.dense(), cast, cast_bias, seed, spec, constants, Resample(resample)
    )
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
    _check(x, num_groups, Modulation(weight, bias, scale, shift, pre_shift))
    backend, reason = choose_backend(x)
    layout = str(memory_format(x)).removeprefix("torch.").removesuffix("_format")
    dense = x.is_contiguous() or memory_format(x) != torch.contiguous_format
    lines = [
        f"group_norm_silu {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}, "
        f"{num_groups} groups of {x.shape[1] // num_groups} channels",
        f"  layout:   {layout}" + ("" if dense else " (x is strided: copied once)"),
        f"  backend:  {backend}: {reason}",
        f"  versions: {versions.describe(versions.installed())}",
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


# A tuple, since torch.compile traces a union of types in newer versions only.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Asked for once, since torch.compile does not trace the question; its decorator for such functions
# would import the whole compiler, which takes longer than importing torch.
_WITH_AUTOCAST = tuple(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia")
    if torch.amp.is_autocast_available(kind)
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check(x: Tensor, num_groups: int, modulation: Modulation) -> None:
    """Runs on every call, so what is as expected passes by the fewest questions."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        what = arguments.received(x) if not isinstance(x, Tensor) else f"of layout {x.layout}"
        raise TypeError(f"x is {what}; expected a dense tensor of shape (N, C, *spatial).")
    size = x.shape
    if not 3 <= len(size) <= 5:
        raise ValueError(
            f"x has shape {tuple(size)}; expected (N, C, *spatial) with 1 to 3 spatial dimensions."
        )
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"x is {x.dtype}; expected a floating-point tensor of 16, 32 or 64 bits. Convert it "
            "first."
        )
    N, C = size[0], size[1]
    if type(num_groups) is not int and not isinstance(num_groups, torch.SymInt):
        arguments.integers("group_norm_silu", 1, num_groups=num_groups)
    if num_groups < 1 or C % num_groups:
        raise ValueError(
            f"{C} channels cannot be divided into {num_groups} groups; num_groups must be a "
            f"positive divisor of {C}."
        )
    row, device, strided = (N, C), x.device, torch.strided
    shapes = ((C,), (C,), row, row, row)
    for name, tensor, shape in zip(Modulation._fields, modulation, shapes, strict=True):
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.dtype.is_floating_point
            and tensor.device == device
            and tensor.layout is strided
        ):
            _refuse(name, tensor, shape, x)


def _refuse(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Say what is wrong with one of the modulation tensors."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} is {arguments.received(tensor)}; expected None or a dense tensor of shape "
            f"{shape}."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {shape} for x of shape "
            f"{tuple(x.shape)}."
        )
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor.")
    raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them.")


def _constants(
    x: Tensor,
    num_groups: int,
    eps: float,
    activation: Activation,
    dropout_p: float,
    training: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Spec]:
    """The seed of dropout, if there is any, and the constants of a call."""
    if not (
        type(eps) is type(dropout_p) is float
        and 0.0 <= eps < math.inf
        and 0.0 <= dropout_p < 1.0
        and type(training) is bool
        and (activation is None or (type(activation) is str and activation == "silu"))
    ):
        owner = "group_norm_silu"
        arguments.numbers(owner, 0, eps=eps)
        arguments.probabilities(owner, dropout_p=dropout_p)
        arguments.flags(owner, training=training)
        arguments.one_of(owner, ("silu", None), activation=activation)
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
