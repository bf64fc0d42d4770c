"""The operator as a module: a group norm that also applies the activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resblock_bench.reference import arguments

from .functional import Activation, group_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """y = silu((x̂·weight + bias)·(1 + scale) + shift), x̂ the group-normalised x + pre_shift.

    Drop-in for `nn.GroupNorm` or `GroupNorm32` with the SiLU behind it: same parameters, same
    state-dict keys. The norm is computed in fp32 whatever the dtype of x, and returned in x's.

    num_groups, num_channels, eps, affine: as in `nn.GroupNorm`. activation: "silu", or None for the
    norm alone. forward: input (N, C, *spatial), called as in `nn.GroupNorm`, with any number of
    spatial dimensions, none too; scale, shift and pre_shift (N, C) or absent.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: Activation = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments.group_norm(self, num_groups, num_channels, eps)
        arguments.flags(self, affine=affine)
        arguments.one_of(self, ("silu", None), activation=activation)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_shift: Tensor | None = None,
    ) -> Tensor:
        return normalise(self, input, scale, shift, pre_shift, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


def normalise(
    norm: nn.GroupNorm,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_shift: Tensor | None = None,
    *,
    activation: Activation = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """What the norm's parameters make of x with the operator; of any number of dimensions."""
    shape = None
    if isinstance(x, Tensor) and (x.dim() == 2 or x.dim() > 5):
        # The operator knows no others: all positions become one dimension.
        shape, x = x.shape, x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    y = group_norm_silu(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        scale,
        shift,
        pre_shift=pre_shift,
        eps=norm.eps,
        activation=activation,
        dropout_p=dropout_p,
    )
    # No view, as no other output is one.
    return y if shape is None else torch.ops.aten._unsafe_view(y, shape)
