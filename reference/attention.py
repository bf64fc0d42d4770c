"""Self-attention over all positions of a feature map.

References
    Vaswani et al., arXiv:1706.03762
    Dhariwal & Nichol, arXiv:2105.05233 (64 channels a head, attention at 32, 16 and 8)
    Radford et al., CLIP, arXiv:2103.00020 (the attention pool)

Shapes: N batch, C channels, T positions (the spatial sizes flattened), heads · c = C.
"""

import torch
from torch import Tensor, nn

from . import arguments
from .blocks import check_channels
from .checkpoint import checkpoint
from .layers import conv_nd, normalization, zero_module


def qkv_attention(qkv: Tensor, num_heads: int, new_order: bool) -> Tensor:
    """softmax(qᵀk / sqrt(c))·v for every head, from queries, keys and values in one tensor.

    The 3C rows of ``qkv`` are laid out as [heads, (q k v), c] in the legacy order and as
    [(q k v), heads, c] in the new one; released weights fix which. q and k are each scaled by
    c^(−1/4), which a 16-bit product survives better than one division afterwards, and the softmax
    runs in float32.

    qkv: (N, 3C, T) -> (N, C, T), rows [heads, c].
    """
    N, C3, T = qkv.shape
    if C3 % (3 * num_heads):
        raise ValueError(
            f"qkv_attention: {C3} rows are not 3 × {num_heads} heads × a whole number of channels"
        )
    c = C3 // (3 * num_heads)
    if new_order:
        q, k, v = qkv.reshape(N, 3, num_heads, c, T).unbind(1)  # each (N, heads, c, T)
    else:
        q, k, v = qkv.reshape(N, num_heads, 3, c, T).unbind(2)
    scale = c**-0.25
    logits: Tensor = (q * scale).transpose(-1, -2) @ (k * scale)  # (N, heads, T of q, T of k)
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    weight = logits.softmax(dim=-1, dtype=at_least_fp32).to(v.dtype)
    out: Tensor = (v @ weight.transpose(-1, -2)).reshape(N, C3 // 3, T)
    return out


class AttentionBlock(nn.Module):
    """y = x + proj_out(attention(qkv(norm(x)))), over all positions of x.

    channels                 C; a multiple of 32
    num_heads                number of heads, unless
    num_head_channels        channels a head is given (not −1): then C / num_head_channels heads
    use_checkpoint           keep only x for the backward, recompute the rest. (guided-diffusion
                             checkpoints this block whatever its flag says.)
    use_new_attention_order  layout of the qkv rows, see ``qkv_attention``

    x: (N, C, *S) -> the same shape. proj_out starts at zero, the block at the identity.
    Raises ValueError where the heads do not divide the channels.
    Source: guided-diffusion ``unet.AttentionBlock``, whose state-dict keys these are.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        arguments.integers(self, 1, channels=channels)
        arguments.integers(self, -1, num_heads=num_heads, num_head_channels=num_head_channels)
        arguments.flags(
            self,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        if num_head_channels != -1:
            if num_head_channels <= 0 or channels % num_head_channels:
                raise ValueError(
                    f"AttentionBlock: {channels} channels are not a whole number of heads of "
                    f"num_head_channels={num_head_channels} channels"
                )
            num_heads = channels // num_head_channels
        if num_heads <= 0 or channels % num_heads:
            raise ValueError(
                f"AttentionBlock: num_heads={num_heads} must be positive and divide the "
                f"{channels} channels"
            )
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *S) -> (N, C, *S)."""
        check_channels(self, x, self.channels)
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (N, C, T)
        h = qkv_attention(self.qkv(self.norm(tokens)), self.num_heads, self.use_new_attention_order)
        out: Tensor = (tokens + self.proj_out(h)).reshape(x.shape)
        return out


class AttentionPool(nn.Module):
    """Pool a feature map to one vector: attention, read at an extra token, the mean of the map.

    tokens          T, the number of positions of the map
    channels        C
    head_channels   channels a head
    out_channels    K

    x: (N, C, *S) with T positions -> (N, K). Raises ValueError for another number of positions:
    the positional embedding is learned for T + 1.
    Source: guided-diffusion ``unet.AttentionPool2d``, after CLIP; its state-dict keys.
    """

    def __init__(self, tokens: int, channels: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        arguments.integers(
            self,
            1,
            tokens=tokens,
            channels=channels,
            head_channels=head_channels,
            out_channels=out_channels,
        )
        if channels % head_channels:
            raise ValueError(
                f"AttentionPool: {channels} channels are not a whole number of heads of "
                f"{head_channels} channels"
            )
        self.num_heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens + 1) / channels**0.5)
        self.qkv_proj = conv_nd(1, channels, 3 * channels, 1)
        self.c_proj = conv_nd(1, channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *S) -> (N, K)."""
        x = x.flatten(2)
        if x.shape[2] + 1 != self.positional_embedding.shape[1]:
            raise ValueError(
                f"AttentionPool: the map has {x.shape[2]} positions, but the positional embedding "
                f"was built for {self.positional_embedding.shape[1] - 1}; the input must have the "
                "image_size that the model was built with"
            )
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2)  # (N, C, 1 + T)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.c_proj(qkv_attention(self.qkv_proj(x), self.num_heads, new_order=True))
        out: Tensor = x[:, :, 0]
        return out
