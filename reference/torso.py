"""The encoder, middle and decoder that UNetModel and EncoderUNetModel are made of.

Level l of L has int(channel_mult[l] · model_channels) channels at 1/2^l of the input's size. The
encoder keeps the output of each of its blocks; the decoder concatenates them back, last first.

References: Ronneberger et al., arXiv:1505.04597; Dhariwal & Nichol, arXiv:2105.05233.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import arguments
from .attention import AttentionBlock
from .blocks import Downsample, ResBlock, TimestepEmbedSequential, Upsample
from .layers import SiLU, conv_nd, linear


@dataclass(frozen=True)
class Torso:
    """What all blocks of one U-Net share; the methods make its parts.

    The fields are UNetModel's arguments of the same names, and ``owner``, the name of the model for
    messages. ``attention_resolutions`` holds downsampling rates, not pixels. Raises ValueError or
    TypeError for arguments that no model can be built of, and for rates of which no level has one.
    """

    owner: str
    model_channels: int
    num_res_blocks: int
    attention_resolutions: Collection[int]
    dropout: float
    channel_mult: Sequence[float]
    conv_resample: bool
    dims: int
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool

    def __post_init__(self) -> None:
        owner = self.owner
        arguments.integers(
            owner, 1, model_channels=self.model_channels, num_res_blocks=self.num_res_blocks
        )
        arguments.integers(owner, -1, num_head_channels=self.num_head_channels)
        # Where the heads follow from their channels, their number is not read.
        least_heads = 1 if self.num_head_channels == -1 else -1
        arguments.integers(
            owner, least_heads, num_heads=self.num_heads, num_heads_upsample=self.num_heads_upsample
        )
        arguments.multipliers(owner, channel_mult=self.channel_mult)
        arguments.probabilities(owner, dropout=self.dropout)
        arguments.one_of(owner, (1, 2, 3), dims=self.dims)
        arguments.flags(
            owner,
            conv_resample=self.conv_resample,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
            use_new_attention_order=self.use_new_attention_order,
        )
        arguments.integer_collections(owner, 1, attention_resolutions=self.attention_resolutions)
        rates = set(self.attention_resolutions)
        levels = [2**level for level in range(len(self.channel_mult))]
        if rates and not rates & set(levels):
            raise ValueError(
                f"{owner}: attention_resolutions must hold downsampling rates, not pixels; got "
                f"{self.attention_resolutions!r}, and the levels have the rates {levels}. Pass () "
                "for no attention but the middle's"
            )

    @property
    def emb_channels(self) -> int:
        return 4 * self.model_channels

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    def time_embed(self) -> nn.Sequential:
        """(N, model_channels) sinusoids -> (N, E)."""
        E = self.emb_channels
        return nn.Sequential(linear(self.model_channels, E), SiLU(), linear(E, E))

    def encoder(self, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
        """The input blocks, and the channels that each of them gives."""
        c = self.widths[0]
        stem = conv_nd(self.dims, in_channels, c, 3, padding=1)
        blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
        skips = [c]
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self.res_block(c, width)]
                c = width
                if 2**level in self.attention_resolutions:
                    layers.append(self.attention(c, self.num_heads))
                blocks.append(TimestepEmbedSequential(*layers))
                skips.append(c)
            if level < len(self.widths) - 1:
                down: nn.Module
                if self.resblock_updown:
                    down = self.res_block(c, c, down=True)
                else:
                    down = Downsample(c, self.conv_resample, self.dims)
                blocks.append(TimestepEmbedSequential(down))
                skips.append(c)
        return blocks, skips

    def middle(self) -> TimestepEmbedSequential:
        c = self.widths[-1]
        return TimestepEmbedSequential(
            self.res_block(c, c), self.attention(c, self.num_heads), self.res_block(c, c)
        )

    def decoder(self, skips: list[int]) -> nn.ModuleList:
        """The output blocks, for the ``skips`` that encoder() gave."""
        skips = list(skips)
        blocks = nn.ModuleList()
        c = self.widths[-1]
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self.res_block(c + skips.pop(), width)]
                c = width
                if 2**level in self.attention_resolutions:
                    layers.append(self.attention(c, self.num_heads_upsample))
                if level > 0 and i == self.num_res_blocks:
                    if self.resblock_updown:
                        layers.append(self.res_block(c, c, up=True))
                    else:
                        layers.append(Upsample(c, self.conv_resample, self.dims))
                blocks.append(TimestepEmbedSequential(*layers))
        return blocks

    def res_block(self, c_in: int, c_out: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            c_in,
            self.emb_channels,
            self.dropout,
            out_channels=c_out,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def attention(self, c: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            c,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )


def cast_convolutions(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the convolutions inside ``modules`` in place, and nothing else.

    This is the 16-bit mode of the original models: norms, Linears and embeddings stay float32.
    """
    for module in modules:
        for m in module.modules():
            if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                m.to(dtype)
