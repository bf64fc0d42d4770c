"""Classes with the structure of EDM's original networks, in other words.

Their own Linear, Conv2d and GroupNorm, which cast their weights to the input's dtype, the SiLU as a
function, attention inside the block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).t() + self.bias.to(x.dtype)


class Conv2d(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_filter: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, False
        size = (out_channels, in_channels, kernel, kernel)
        scale = (in_channels * kernel**2) ** -0.5 if kernel else 1.0
        self.weight = nn.Parameter(torch.randn(size) * scale) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.up or self.down:
            taps = self.resample_filter.to(x.dtype)
            padding = (taps.shape[-1] - 1) // 2
            each = taps.tile([self.in_channels, 1, 1, 1])
            if self.up:
                x = F.conv_transpose2d(
                    x, 4 * each, groups=self.in_channels, stride=2, padding=padding
                )
            if self.down:
                x = F.conv2d(x, each, groups=self.in_channels, stride=2, padding=padding)
        if weight is not None:
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if bias is not None:
            x = x.add_(bias.reshape(1, -1, 1, 1))
        return x


class GroupNorm(nn.Module):
    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class UNetBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: tuple[int, ...] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.emb_channels = emb_channels
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        how: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **how)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **how)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        given = x
        x = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = e.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x.add_(e)))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        x = x.add_(given if self.skip is None else self.skip(given)) * self.skip_scale
        if self.num_heads:
            N, C, *_ = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(N * self.num_heads, C // self.num_heads, 3, -1)
            q, k, v = qkv.unbind(2)
            at_least = torch.promote_types(q.dtype, torch.float32)
            scaled = (k / math.sqrt(k.shape[1])).to(at_least)
            weight = torch.einsum("ncq,nck->nqk", q.to(at_least), scaled).softmax(dim=2)
            a = torch.einsum("nqk,nck->ncq", weight.to(q.dtype), v)
            x = self.proj(a.reshape(*x.shape)).add_(x) * self.skip_scale
        return x


class Network(nn.Module):
    """A small one: down, attention, up, and a head whose SiLU is a function."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = Conv2d(3, 16, 3)
        self.blocks = nn.ModuleList(
            [
                UNetBlock(16, 24, 12, down=True, **options),
                UNetBlock(24, 24, 12, attention=True, num_heads=2, **options),
                UNetBlock(24, 16, 12, up=True, **options),
            ]
        )
        self.out_norm = GroupNorm(16)
        self.out_conv = Conv2d(16, 3, 3)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, emb)
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out
