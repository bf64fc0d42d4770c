"""The residual blocks with their norms, modulation, activation and dropout fused.

Each is its reference with another `_forward`: same arguments, same parameters, same state-dict
keys, and a `TimestepBlock` still. `checkpoint` says what is kept for the backward:

    "none"       x and, per norm, its input and the activation that the convolution reads
    "selective"  x and, per norm, its input: the activation is written again in the backward
    "full"       x and emb: the whole block is run again in the backward
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from resblock_bench import reference
from resblock_bench.kernels.functional import group_norm_silu, norm_act_conv
from resblock_bench.kernels.resample import Resample

CheckpointMode = Literal["none", "selective", "full"]
ConvNd: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _FusedBlock(reference.TimestepBlock):
    """What both blocks share: the checkpoint mode, and norm-activation-convolution under it."""

    use_checkpoint: bool
    _selective: bool

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
    ) -> Tensor:
        arguments: dict[str, Any] = {
            "scale": scale,
            "shift": shift,
            "pre_shift": pre_shift,
            "eps": norm.eps,
            "dropout_p": dropout_p,
            "training": self.training,
        }
        if self.checkpoint == "selective" and torch.is_grad_enabled():
            return norm_act_conv(
                x, norm.num_groups, norm.weight, norm.bias, conv, resample=resample, **arguments
            )
        h = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, **arguments)
        out: Tensor = conv(Resample(resample).forward(h))
        return out


class ResBlock(_FusedBlock, reference.ResBlock):
    """`reference.ResBlock` with fused norms; the reference's arguments and state-dict keys.

    checkpoint: "none", "selective" or "full", see above; the attribute may be set later.
    `use_checkpoint=True` is the same as checkpoint="full". Raises ValueError for another mode.
    """

    def __init__(self, *args: Any, checkpoint: CheckpointMode = "none", **kwargs: Any) -> None:
        check_mode(checkpoint)
        super().__init__(*args, **kwargs)
        self.checkpoint = "full" if self.use_checkpoint else checkpoint

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, _, in_conv = cast("tuple[nn.GroupNorm, Any, ConvNd]", tuple(self.in_layers))
        out_norm, _, out_drop, out_conv = cast(
            "tuple[nn.GroupNorm, Any, nn.Dropout, ConvNd]", tuple(self.out_layers)
        )
        h = self._norm_act_conv(x, in_norm, in_conv, resample=_direction(self.h_upd))
        e: Tensor = self.emb_layers(emb)  # (N, C_out or 2·C_out)
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self._norm_act_conv(
                h, out_norm, out_conv, scale=scale, shift=shift, dropout_p=out_drop.p
            )
        else:
            h = self._norm_act_conv(h, out_norm, out_conv, pre_shift=e, dropout_p=out_drop.p)
        skip: Tensor = self.skip_connection(self.x_upd(x))
        return skip + h


class EDMBlock(_FusedBlock, reference.EDMBlock):
    """`reference.EDMBlock` with fused norms; the reference's arguments and state-dict keys.

    checkpoint: as in `ResBlock`. The attention inside the block is the reference's.
    """

    def __init__(self, *args: Any, checkpoint: CheckpointMode = "none", **kwargs: Any) -> None:
        check_mode(checkpoint)
        super().__init__(*args, **kwargs)
        self.checkpoint = "full" if self.use_checkpoint else checkpoint

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self._norm_act_conv(x, self.norm0, self.conv0, resample=self.resample)
        e = self.affine(emb)
        if self.adaptive_scale:
            scale, shift = e.chunk(2, dim=1)
            h = self._norm_act_conv(
                h, self.norm1, self.conv1, scale=scale, shift=shift, dropout_p=self.dropout
            )
        else:
            h = self._norm_act_conv(h, self.norm1, self.conv1, pre_shift=e, dropout_p=self.dropout)
        x = self._resampled(x)
        y: Tensor = ((x if self.skip is None else self.skip(x)) + h) * self.skip_scale
        return self._attend(y) if self.num_heads else y


def check_mode(mode: CheckpointMode) -> None:
    if mode not in get_args(CheckpointMode):
        raise ValueError(f"checkpoint is {mode!r}; allowed are 'none', 'selective' and 'full'.")


def _direction(resampling: nn.Module) -> Literal["up", "down"] | None:
    if isinstance(resampling, reference.Upsample):
        return "up"
    return "down" if isinstance(resampling, reference.Downsample) else None
