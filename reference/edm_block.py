"""EDM's residual block, with the self-attention that lies inside it.

The block is ADM's with five differences: the embedding comes without a SiLU of its own (the
network applies one, once), the groups are min(32, C/4) instead of 32, the norm computes in the
dtype of its input, attention sits inside the block, and the output may be scaled by sqrt(1/2).

References
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    arXiv:2206.00364
    Song et al., Score-Based Generative Modeling through SDEs, arXiv:2011.13456 (DDPM++)

Parameter names are those of EDM's released networks; their ``resample_filter`` buffers are not
kept, since the filter of these models, [1, 1], is the nearest ×2 and the 2×2 mean.
Shapes: N batch, C channels, E width of the embedding, H, W sizes, T = H·W.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments
from .blocks import TimestepBlock, check_channels, check_embedding
from .checkpoint import checkpoint
from .layers import GroupNorm, zero_module


def edm_group_norm(channels: int, eps: float) -> GroupNorm:
    """Group norm of min(32, C // 4) groups: at least four channels in each.

    Raises ValueError where that many groups do not divide the channels.
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"edm_group_norm: {channels} channels cannot be split into min(32, C // 4) equal groups"
            "; use a multiple of 4 channels, above 128 of 32"
        )
    return GroupNorm(groups, channels, eps=eps)


class EDMBlock(TimestepBlock):
    """One residual block of EDM, with self-attention after it if asked for.

        h = conv0(up_or_down(silu(norm0(x))))
        e = affine(emb)
        h = silu(norm1(h)·(1 + scale) + shift), [scale, shift] = e     with adaptive_scale
        h = silu(norm1(h + e))                                         without
        y = (skip(up_or_down(x)) + conv1(dropout(h))) · skip_scale
        y = (y + proj(attention(qkv(norm2(y))))) · skip_scale          with attention

    in_channels, out_channels   C_in, C_out
    emb_channels                E
    up, down                    resample ×2 or ×½ inside the block; at most one of them
    attention                   add the last line, with num_heads heads, or, if None,
                                C_out / channels_per_head of them
    dropout                     probability in [0, 1)
    skip_scale                  factor of every sum: 1 for ADM, sqrt(1/2) for DDPM++
    eps                         of the norms
    resample_proj               a 1×1 skip convolution wherever the block resamples, not only
                                where C_in ≠ C_out
    adaptive_scale              modulate after the norm instead of adding before it
    use_checkpoint              keep only x and emb for the backward, recompute the rest

    x: (N, C_in, H, W), emb: (N, E), already activated -> (N, C_out, H', W'). conv1 and proj start
    at zero. The rows of qkv are laid out as [heads, c, (q k v)].
    Raises ValueError for arguments or inputs outside of this.
    """

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
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        arguments.integers(
            self,
            1,
            in_channels=in_channels,
            out_channels=out_channels,
            emb_channels=emb_channels,
            channels_per_head=channels_per_head,
        )
        if num_heads is not None:
            arguments.integers(self, 1, num_heads=num_heads)
        arguments.probabilities(self, dropout=dropout)
        arguments.numbers(self, -math.inf, skip_scale=skip_scale)
        arguments.numbers(self, 0, eps=eps)
        arguments.flags(
            self,
            up=up,
            down=down,
            attention=attention,
            resample_proj=resample_proj,
            adaptive_scale=adaptive_scale,
            use_checkpoint=use_checkpoint,
        )
        if up and down:
            raise ValueError("EDMBlock: up and down are both True; at most one may be")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        self.use_checkpoint = use_checkpoint
        self.resample: Literal["up", "down"] | None = "up" if up else "down" if down else None
        C_in, C_out = in_channels, out_channels

        self.norm0 = edm_group_norm(C_in, eps)
        self.conv0 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * C_out if adaptive_scale else C_out)
        self.norm1 = edm_group_norm(C_out, eps)
        self.conv1 = zero_module(nn.Conv2d(C_out, C_out, 3, padding=1))
        needs_skip = C_in != C_out or (resample_proj and self.resample is not None)
        self.skip = nn.Conv2d(C_in, C_out, 1) if needs_skip else None
        self.num_heads = 0
        if attention:
            self.num_heads = num_heads or C_out // channels_per_head
            if self.num_heads == 0 or C_out % self.num_heads:
                raise ValueError(
                    f"EDMBlock: {C_out} channels cannot be split into num_heads={num_heads} heads "
                    f"(or heads of channels_per_head={channels_per_head})"
                )
            self.norm2 = edm_group_norm(C_out, eps)
            self.qkv = nn.Conv2d(C_out, 3 * C_out, 1)
            self.proj = zero_module(nn.Conv2d(C_out, C_out, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, C_in, H, W), emb: (N, E) -> (N, C_out, H', W')."""
        check_channels(self, x, self.in_channels)
        check_embedding(self, emb, self.emb_channels)
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))  # (N, C_out, H', W')
        e = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = e.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + e))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self._resampled(x)
        y: Tensor = ((x if self.skip is None else self.skip(x)) + h) * self.skip_scale
        return self._attend(y) if self.num_heads else y

    def _attend(self, y: Tensor) -> Tensor:
        N, C, H, W = y.shape
        c = C // self.num_heads
        qkv = self.qkv(self.norm2(y)).reshape(N, self.num_heads, c, 3, H * W)
        q, k, v = qkv.unbind(3)  # each (N, heads, c, T)
        logits = q.transpose(-1, -2) @ (k / math.sqrt(c))  # (N, heads, T of q, T of k)
        at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
        weight = logits.softmax(dim=-1, dtype=at_least_fp32).to(v.dtype)
        a = (v @ weight.transpose(-1, -2)).reshape(N, C, H, W)
        out: Tensor = (y + self.proj(a)) * self.skip_scale
        return out

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x
