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

from .alterations import alteration, kernel_of
from .dispatch import choose_backend
from .functional import group_norm_silu, norm_act_kernel
from .op import Kernel, residual_add
from .resample import Direction, Resample

CheckpointMode = Literal["none", "selective", "full"]


class FusedBlock:
    """Mixin of every fused block: the checkpoint mode, and norm-activation-convolution under it."""

    use_checkpoint: bool = False
    _selective: bool = False
    _convolution_resamples = False
    """Whether calling the first convolution resamples, too."""

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

    def _kernel(self, conv: nn.Module, x: Tensor) -> Kernel | None:
        """The convolution as its parameters, for input like x, unless it is more than these."""
        return kernel_of(conv)

    def _norm_act_conv(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        conv: nn.Module,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_shift: Tensor | None = None,
        dropout_p: float = 0.0,
        resample: Direction | None = None,
        without_bias: Kernel | None = None,
    ) -> Tensor:
        """without_bias: the convolution, whose bias is left to the caller."""
        arguments: dict[str, Any] = {
            "scale": scale,
            "shift": shift,
            "pre_shift": pre_shift,
            "eps": norm.eps,
            "dropout_p": dropout_p,
        }
        selective = self.checkpoint == "selective" and torch.is_grad_enabled()
        kernel = without_bias or (self._kernel(conv, x) if selective else None)
        if selective and kernel is not None:
            return norm_act_kernel(
                x, norm.num_groups, norm.weight, norm.bias, kernel, resample=resample, **arguments
            )
        h = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, **arguments)
        if without_bias is None and self._convolution_resamples:
            out: Tensor = conv(h)
            return out
        h = Resample(resample).forward(h)
        out = conv(h) if without_bias is None else without_bias.convolve(h)
        return out

    def _residual_branch(
        self,
        x: Tensor,
        e: Tensor | None,
        first: tuple[nn.GroupNorm, nn.Module],
        second: tuple[nn.GroupNorm, nn.Module],
        *,
        modulated: bool,
        dropout_p: float,
        resample: Direction | None,
    ) -> tuple[Tensor, Tensor | None]:
        """conv(norm(conv(norm(x)))) modulated by e, and the last bias if it is still to be added.

        e: the embedding of the block's width, or twice that if it modulates, for every sample or
        one for all; None without one.

        On the GPU a convolution's bias is a pass over its output. There the first one becomes part
        of the add before the second norm, and the second one part of the residual addition.
        """
        if e is not None and len(e) != len(x):
            e = e.expand(len(x), -1)
        kernel, first_bias = self._without_bias(first[1], x)
        h = self._norm_act_conv(x, *first, resample=resample, without_bias=kernel)
        scale, shift, pre_shift = None, None, e
        if modulated and e is not None:
            scale, shift, pre_shift = *e.chunk(2, dim=1), None
        if first_bias is not None:
            pre_shift = (
                first_bias.expand(len(x), -1)
                if pre_shift is None
                else pre_shift.float() + first_bias
            )
        kernel, last_bias = self._without_bias(second[1], h)
        h = self._norm_act_conv(
            h,
            *second,
            scale=scale,
            shift=shift,
            pre_shift=pre_shift,
            dropout_p=dropout_p,
            without_bias=kernel,
        )
        return h, last_bias

    def _without_bias(
        self, conv: nn.Module, x: Tensor
    ) -> tuple[Kernel, Tensor] | tuple[None, None]:
        """A convolution and its bias apart, where the bias is better added elsewhere."""
        if choose_backend(x)[0] != "triton":
            return None, None
        kernel = self._kernel(conv, x)
        if kernel is None or kernel.bias is None:
            return None, None
        return kernel._replace(bias=None), kernel.bias


class FusedResBlock(FusedBlock):
    """Mixin of a block of `reference.ResBlock`'s structure: its `_forward`."""

    in_layers: nn.Sequential
    emb_layers: nn.Sequential
    out_layers: nn.Sequential
    skip_connection: nn.Module
    use_scale_shift_norm: bool

    def _alteration(self) -> str | None:
        """What in the block is not as its class builds it."""
        return alteration(cast(nn.Module, self))

    def _direction(self) -> Direction | None:
        return _direction(cast(Any, self).h_upd)

    def _skip(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip_connection(cast(Any, self).x_upd(x))
        return out

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self._alteration() is not None or not embeds(emb, x):
            y: Tensor = super()._forward(x, emb)  # type: ignore[misc]
            return y
        in_norm, _, in_conv = cast("tuple[nn.GroupNorm, Any, nn.Module]", tuple(self.in_layers))
        out_norm, _, out_drop, out_conv = cast(
            "tuple[nn.GroupNorm, Any, nn.Dropout, nn.Module]", tuple(self.out_layers)
        )
        h, bias = self._residual_branch(
            x,
            self.emb_layers(emb),  # (N, C_out or 2·C_out)
            (in_norm, in_conv),
            (out_norm, out_conv),
            modulated=self.use_scale_shift_norm,
            dropout_p=out_drop.p if out_drop.training else 0.0,
            resample=self._direction(),
        )
        return add(self._skip(x), h, bias)


class ResBlock(FusedResBlock, reference.ResBlock):
    """`reference.ResBlock` with fused norms; the reference's arguments and state-dict keys.

    checkpoint: "none", "selective" or "full", see above; the attribute may be set later.
    `use_checkpoint=True` is the same as checkpoint="full". Raises ValueError for another mode.
    """

    def __init__(self, *args: Any, checkpoint: CheckpointMode = "none", **kwargs: Any) -> None:
        check_mode(checkpoint)
        super().__init__(*args, **kwargs)
        self.checkpoint = "full" if self.use_checkpoint else checkpoint


class EDMBlock(FusedBlock, reference.EDMBlock):
    """`reference.EDMBlock` with fused norms; the reference's arguments and state-dict keys.

    checkpoint: as in `ResBlock`. The attention inside the block is the reference's.
    """

    def __init__(self, *args: Any, checkpoint: CheckpointMode = "none", **kwargs: Any) -> None:
        check_mode(checkpoint)
        super().__init__(*args, **kwargs)
        self.checkpoint = "full" if self.use_checkpoint else checkpoint

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if alteration(self) is not None or not embeds(emb, x):
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
        y = add(x if self.skip is None else self.skip(x), h, bias, self.skip_scale)
        return self._attend(y) if self.num_heads else y


def embeds(emb: Tensor, x: Tensor) -> bool:
    """Whether every sample of x has an embedding, or one is for all, as in EDM's sampler."""
    return emb.dim() == 2 and len(emb) in (1, len(x))


def add(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    if bias is not None:
        return residual_add(skip, h, bias, scale)
    return skip + h if scale == 1.0 else (skip + h) * scale


def check_mode(mode: CheckpointMode) -> None:
    if not isinstance(mode, str) or mode not in get_args(CheckpointMode):
        raise ValueError(f"checkpoint is {mode!r}; allowed are 'none', 'selective' and 'full'.")


def _direction(resampling: nn.Module) -> Direction | None:
    if isinstance(resampling, reference.Upsample):
        return "up"
    return "down" if isinstance(resampling, reference.Downsample) else None
