"""What one call of the operator is: its constants, and the tensors that modulate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]

SECOND_DERIVATIVE = (
    "group_norm_silu and the fused blocks can be differentiated once, and a second derivative was "
    "asked for. Use resblock_bench.reference for that part of the model."
)

GRADS_BATCHED = (
    "torch.autograd.grad was called with is_grads_batched=True, which group_norm_silu and the "
    "fused blocks do not take. Use torch.func.vmap over torch.func.vjp, or call it once for each."
)

FORWARD_MODE = (
    "group_norm_silu and the fused blocks have no forward-mode derivative (jvp, jacfwd, hessian). "
    "Use torch.func.vjp or jacrev, or resblock_bench.reference for that part of the model."
)


class Spec(NamedTuple):
    """The constants of one call.

    num_groups: G. eps: added to the variance. activation: SiLU or none. dropout_p: probability of
    zeroing an element after the activation, 0 when not training. out_dtype: dtype of the output.
    """

    num_groups: int
    eps: float
    activation: bool
    dropout_p: float
    out_dtype: torch.dtype


class Modulation(NamedTuple):
    """The small tensors that shift and scale the activation; any of them may be absent.

    weight, bias: (C,), the affine of the group norm. scale, shift: (N, C), applied after it as
    (1 + scale)·h + shift. pre_shift: (N, C), added to x before the statistics are taken.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    pre_shift: Tensor | None = None

    # Methods, since torch.compile of earlier versions takes a named tuple's property for a tensor.
    def affine(self) -> bool:
        """Whether the norm has an affine of its own."""
        return self.weight is not None or self.bias is not None

    def after_norm(self) -> bool:
        """Whether anything differs from sample to sample after the norm."""
        return self.scale is not None or self.shift is not None

    def dense(self) -> Modulation:
        """With contiguous channels, as the Triton kernels read them; rows may lie apart."""
        return Modulation(*(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in self))

    def folded(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """γ' = γ(1 + s) and β' = β(1 + s) + t, both (N, C) in `dtype`; z = x̂γ' + β'."""
        N, C = x.shape[:2]
        # 1 + scale in full precision: in 16 bits it would lose scale's low bits.
        gain = x.new_ones((N, C), dtype=dtype) if self.scale is None else self.scale.to(dtype) + 1
        if self.bias is not None:
            shift = gain.new_zeros(()) if self.shift is None else self.shift.to(dtype)
            offset = torch.addcmul(shift, gain, self.bias.to(dtype))
        elif self.shift is not None:
            offset = self.shift.to(dtype)
        else:
            offset = torch.zeros_like(gain)
        if self.weight is not None:
            gain = gain * self.weight.to(dtype)
        # ATen's kernels read affine vectors as contiguous, whatever strides the rows came with.
        return gain.contiguous(), offset.contiguous()

    def gradients(self, sums: tuple[Tensor, Tensor, Tensor | None]) -> Gradients:
        """Gradients of the five tensors from the per-(n, c) sums of the backward.

        sums = (S1, S2, db), each (N, C), or (1, C) where it is summed over n already and there is
        neither scale nor shift: S1 = Σ dz, S2 = Σ dz·x̂ over the spatial positions, and
        db = Σ dx, which is only there with a pre_shift. Then

            dshift = S1                dbias   = Σ_n (1 + s)·S1
            dscale = γ·S2 + β·S1       dweight = Σ_n (1 + s)·S2        dpre_shift = db
        """
        s1, s2, db = sums
        dscale, of_weight, of_bias = None, s2, s1
        if self.scale is not None:
            dscale = s2 if self.weight is None else s2 * self.weight.to(s2.dtype)
            if self.bias is not None:
                dscale = torch.addcmul(dscale, s1, self.bias.to(s1.dtype))
            one_plus_scale = 1 + self.scale.to(s1.dtype)
            of_weight, of_bias = one_plus_scale * s2, one_plus_scale * s1
        return (
            _like(of_weight.sum(0) if self.weight is not None else None, self.weight),
            _like(of_bias.sum(0) if self.bias is not None else None, self.bias),
            _like(dscale, self.scale),
            _like(s1 if self.shift is not None else None, self.shift),
            _like(db if self.pre_shift is not None else None, self.pre_shift),
        )


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def spread(per_channel: Tensor, x: Tensor) -> Tensor:
    """(N, C) → (N, C, 1, …), so that it broadcasts over the positions of x."""
    return per_channel.reshape(*per_channel.shape, *(1,) * (x.dim() - 2))


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x: contiguous, channels_last or channels_last_3d.

    Where sizes of 1 make it both, or where it is none of them (a slice, a transpose), it counts as
    contiguous.
    """
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense(t: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    """t with the strides that a new tensor of `layout` has, which is t's own unless given.

    Copied only where the order in memory is another. The stride of a dimension of size 1 can be
    anything; `Tensor.contiguous` leaves it, and ATen's kernels then take the tensor for one of
    another layout. There the same memory is viewed anew.
    """
    if layout is None:
        layout = memory_format(t)
    t = t.contiguous(memory_format=layout)
    if 1 not in t.shape:
        return t
    # The dimensions from the outermost in memory to the innermost.
    order = list(range(t.dim()))
    if layout != torch.contiguous_format:
        order.append(order.pop(1))
    # A compiler views it in any case: a view costs it nothing, and of what a backward makes earlier
    # versions let nobody ask for strides.
    strides, stride = () if torch.compiler.is_compiling() else t.stride(), 1
    for dim in reversed(order):
        if not strides or strides[dim] != stride:
            flat = t.permute(order).reshape(-1)
            if len(flat) == 1:  # whatever its stride
                flat = flat.clone(memory_format=torch.contiguous_format)
            viewed = flat.view([t.shape[d] for d in order])
            return viewed if layout == torch.contiguous_format else viewed.movedim(-1, 1)
        stride *= t.shape[dim]
    return t
