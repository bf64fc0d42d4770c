"""Classes with the structure of improved-diffusion's and guided-diffusion's, in other words.

Their own SiLU and GroupNorm32, a block that is told by TimestepBlock's class, a checkpoint that
keeps no random state and fails with frozen weights, an attention block that ignores its flag.
`ImprovedResBlock` is the older one: it neither resamples nor knows `updown`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def zero_module(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.detach().zero_()
    return module


def normalization(channels: int) -> GroupNorm32:
    return GroupNorm32(32, channels)


class CheckpointFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], length: int, *args: Any) -> Tensor:
        ctx.run, ctx.inputs, ctx.params = run, list(args[:length]), list(args[length:])
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [t.detach().requires_grad_(True) for t in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*[t.view_as(t) for t in inputs])
        found = torch.autograd.grad([out], inputs + ctx.params, grads, allow_unused=True)
        return None, None, *found


def checkpoint(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], params: Iterable[Tensor], flag: bool
) -> Tensor:
    if not flag:
        return run(*inputs)
    out: Tensor = CheckpointFunction.apply(run, len(inputs), *inputs, *params)
    return out


class TimestepBlock(nn.Module):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.channels, self.use_conv, self.dims = channels, use_conv, dims
        self.out_channels = channels
        if use_conv:
            self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        if self.dims == 3:
            size = (x.shape[2], x.shape[3] * 2, x.shape[4] * 2)
            x = F.interpolate(x, size, mode="nearest")
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.channels, self.use_conv, self.dims = channels, use_conv, dims
        self.out_channels = channels
        stride = (1, 2, 2) if dims == 3 else 2
        self.op: nn.Module
        if use_conv:
            self.op = CONVOLUTIONS[dims](channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = POOLS[dims](kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        out: Tensor = self.op(x)
        return out


class ResBlock(TimestepBlock):
    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.emb_channels, self.dropout = channels, emb_channels, dropout
        self.out_channels = out_channels or channels
        self.use_conv, self.use_checkpoint = use_conv, use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        conv, wide = CONVOLUTIONS[dims], self.out_channels
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv(channels, wide, 3, padding=1)
        )
        self.updown = up or down
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(
            SiLU(), nn.Linear(emb_channels, 2 * wide if use_scale_shift_norm else wide)
        )
        self.out_layers = nn.Sequential(
            normalization(wide),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv(wide, wide, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if wide != channels:
            self.skip_connection = (
                conv(channels, wide, 3, padding=1) if use_conv else conv(channels, wide, 1)
            )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            before, conv = self.in_layers[:-1], self.in_layers[-1]
            h = self.h_upd(before(x))
            x = self.x_upd(x)
            h = conv(h)
        else:
            h = self.in_layers(x)
        e = self.emb_layers(emb).type(h.dtype)
        while e.ndim < h.ndim:
            e = e[..., None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(e, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        out: Tensor = self.skip_connection(x) + h
        return out


class ImprovedResBlock(TimestepBlock):
    def __init__(self, channels: int, emb_channels: int, dropout: float, **options: Any) -> None:
        super().__init__()
        made = ResBlock(channels, emb_channels, dropout, **options)
        for name in ("in_layers", "emb_layers", "out_layers", "skip_connection"):
            setattr(self, name, getattr(made, name))
        self.use_scale_shift_norm, self.use_checkpoint = (
            made.use_scale_shift_norm,
            made.use_checkpoint,
        )
        self.channels, self.emb_channels, self.dropout = channels, emb_channels, dropout
        self.out_channels, self.use_conv = made.out_channels, made.use_conv

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        e = self.emb_layers(emb).type(h.dtype)
        e = e.reshape(*e.shape, *(1,) * (h.ndim - e.ndim))
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        out: Tensor = self.skip_connection(x) + h
        return out


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int = 1, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.channels, self.num_heads, self.use_checkpoint = channels, num_heads, use_checkpoint
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), True)

    def _forward(self, x: Tensor) -> Tensor:
        N, C, *spatial = x.shape
        x = x.reshape(N, C, -1)
        qkv = self.qkv(self.norm(x)).reshape(N * self.num_heads, -1, x.shape[-1])
        q, k, v = qkv.chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(N, C, -1)
        out: Tensor = (x + self.proj_out(h)).reshape(N, C, *spatial)
        return out


class UNet(nn.Module):
    """A small one: a level down and up, attention in the middle, a head."""

    def __init__(self, block: Any = ResBlock, updown: bool = True, **options: Any) -> None:
        super().__init__()
        C, E = 32, 16
        options = {"dropout": 0.0, **options}
        self.time_embed = nn.Sequential(nn.Linear(C, E), SiLU(), nn.Linear(E, E))
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(3, C, 3, padding=1)),
                TimestepEmbedSequential(block(C, E, **options)),
                TimestepEmbedSequential(
                    block(C, E, down=True, **options) if updown else Downsample(C, True)
                ),
            ]
        )
        self.middle_block = TimestepEmbedSequential(
            block(C, E, out_channels=2 * C, **options), AttentionBlock(2 * C, 2)
        )
        self.output_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(
                    block(3 * C, E, out_channels=C, **options),
                    block(C, E, up=True, **options) if updown else Upsample(C, True),
                ),
                TimestepEmbedSequential(block(2 * C, E, out_channels=C, **options)),
            ]
        )
        self.out = nn.Sequential(
            normalization(C), SiLU(), zero_module(nn.Conv2d(C, 3, 3, padding=1))
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        emb = self.time_embed(emb)
        kept = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            kept.append(x)
        x = self.middle_block(x, emb)
        x = self.output_blocks[0](torch.cat([x, kept[2]], dim=1), emb)
        x = self.output_blocks[1](torch.cat([x, kept[1]], dim=1), emb)
        out: Tensor = self.out(x)
        return out
