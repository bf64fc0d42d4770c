"""The residual blocks with their norms, modulation, activation and dropout fused.

Each is its reference with another `_forward`: same arguments, same parameters, same state-dict
keys, and a `TimestepBlock` still. `checkpoint` says what is kept for the backward:

    "none"       x and, per norm, its input and the activation that the convolution reads
    "selective"  x and, per norm, its input: the activation is written again in the backward
    "full"       x and emb: the whole block is run again in the backward

A block of which a part was replaced that it would compute itself runs as its reference does. A
convolution that is more than its parameters (a subclass, a wrapper, one with hooks) is called, and
keeps its input with "selective", too.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from resblock_bench import reference

from .alterations import CONVOLUTIONS, ConvNd, alteration, is_exactly, recomputable
from .dispatch import choose_backend
from .functional import group_norm_silu, norm_act_conv
from .op import residual_add
from .resample import Resample

CheckpointMode = Literal["none", "selective", "full"]


class FusedBlock:
    """Mixin of every fused block: the checkpoint mode, and norm-activation-convolution under it."""

    use_checkpoint: bool = False
    _selective: bool = False

    @property
    def checkpoint(self) -> CheckpointMode:
        if self.use_checkpoint:
            return "full"
        return "selective" if self._selective else "none"

    @checkpoint.setter
    def checkpoint(self, mode: CheckpointMode) -> None:
        check_mode(mode)
        self.use_checkpoint = mode == "full"
        self._selective = mode == "selective"

    def _norm_act_conv(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        conv: ConvNd,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_shift: Tensor | None = None,
        dropout_p: float = 0.0,
        resample: Literal["up", "down"] | None = None,
        conv_bias: bool = True,
    ) -> Tensor:
        arguments: dict[str, Any] = {
            "scale": scale,
            "shift": shift,
            "pre_shift": pre_shift,
            "eps": norm.eps,
            "dropout_p": dropout_p,
        }
        selective = self.checkpoint == "selective" and torch.is_grad_enabled()
        if selective and recomputable(conv):
            return norm_act_conv(
                x, norm.num_groups, norm.weight, norm.bias, conv, resample=resample,
                conv_bias=conv_bias, **arguments,
            )  # fmt: skip
        h = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, **arguments)
        h = Resample(resample).forward(h)
        out: Tensor = conv(h) if conv_bias else conv._conv_forward(h, conv.weight, None)
        return out

    def _residual_branch(
        self,
        x: Tensor,
        e: Tensor,
        first: tuple[nn.GroupNorm, ConvNd],
        second: tuple[nn.GroupNorm, ConvNd],
        *,
        modulated: bool,
        dropout_p: float,
        resample: Literal["up", "down"] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """conv(norm(conv(norm(x)))) modulated by e, and the last bias if it is still to be added.

        On the GPU a convolution's bias is a pass over its output. There the first one becomes part
        of the add before the second norm, and the second one part of the residual addition.
        """
        folds = choose_backend(x)[0] == "triton"
        fold_first, fold_second = folds and _is_plain(first[1]), folds and _is_plain(second[1])
        h = self._norm_act_conv(x, *first, resample=resample, conv_bias=not fold_first)
        scale, shift, pre_shift = (*e.chunk(2, dim=1), None) if modulated else (None, None, e)
        if fold_first:
            bias = cast(Tensor, first[1].bias)
            pre_shift = bias.expand(len(x), -1) if pre_shift is None else pre_shift.float() + bias
        h = self._norm_act_conv(
            h,
            *second,
            scale=scale,
            shift=shift,
            pre_shift=pre_shift,
            dropout_p=dropout_p,
            conv_bias=not fold_second,
        )
        return h, second[1].bias if fold_second else None


class ResBlock(FusedBlock, reference.ResBlock):
    """`reference.ResBlock` with fused norms; the reference's arguments and state-dict keys.

    checkpoint: "none", "selective" or "full", see above; the attribute may be set later.
    `use_checkpoint=True` is the same as checkpoint="full". Raises ValueError for another mode.
    """

    def __init__(self, *args: Any, checkpoint: CheckpointMode = "none", **kwargs: Any) -> None:
        check_mode(checkpoint)
        super().__init__(*args, **kwargs)
        self.checkpoint = "full" if self.use_checkpoint else checkpoint

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if alteration(self) is not None:
            return super()._forward(x, emb)
        in_norm, _, in_conv = cast("tuple[nn.GroupNorm, Any, ConvNd]", tuple(self.in_layers))
        out_norm, _, out_drop, out_conv = cast(
            "tuple[nn.GroupNorm, Any, nn.Dropout, ConvNd]", tuple(self.out_layers)
        )
        h, bias = self._residual_branch(
            x,
            self.emb_layers(emb),  # (N, C_out or 2·C_out)
            (in_norm, in_conv),
            (out_norm, out_conv),
            modulated=self.use_scale_shift_norm,
            dropout_p=out_drop.p if out_drop.training else 0.0,
            resample=_direction(self.h_upd),
        )
        return _add(self.skip_connection(self.x_upd(x)), h, bias)


class EDMBlock(FusedBlock, reference.EDMBlock):
    """`reference.EDMBlock` with fused norms; the reference's arguments and state-dict keys.

    checkpoint: as in `ResBlock`. The attention inside the block is the reference's.
    """

    def __init__(self, *args: Any, checkpoint: CheckpointMode = "none", **kwargs: Any) -> None:
        check_mode(checkpoint)
        super().__init__(*args, **kwargs)
        self.checkpoint = "full" if self.use_checkpoint else checkpoint

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if alteration(self) is not None:
            return super()._forward(x, emb)
        h, bias = self._residual_branch(
            x,
            self.affine(emb),
            (self.norm0, self.conv0),
            (self.norm1, self.conv1),
            modulated=self.adaptive_scale,
            dropout_p=self.dropout if self.training else 0.0,
            resample=self.resample,
        )
        x = self._resampled(x)
        y = _add(x if self.skip is None else self.skip(x), h, bias, self.skip_scale)
        return self._attend(y) if self.num_heads else y


def _add(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    if bias is not None:
        return residual_add(skip, h, bias, scale)
    return skip + h if scale == 1.0 else (skip + h) * scale


def _is_plain(conv: ConvNd) -> bool:
    """Whether the convolution may be called by its parameters, without its bias."""
    return is_exactly(conv, CONVOLUTIONS) and conv.bias is not None


def check_mode(mode: CheckpointMode) -> None:
    if not isinstance(mode, str) or mode not in get_args(CheckpointMode):
        raise ValueError(f"checkpoint is {mode!r}; allowed are 'none', 'selective' and 'full'.")


def _direction(resampling: nn.Module) -> Literal["up", "down"] | None:
    if isinstance(resampling, reference.Upsample):
        return "up"
    return "down" if isinstance(resampling, reference.Downsample) else None
