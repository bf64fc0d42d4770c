"""The noisy-image classifier of ADM: the encoder half of the U-Net and a pool.

Reference: Dhariwal & Nichol, arXiv:2105.05233, section 4 (classifier guidance).

Shapes: N batch, C channels, K outputs, ``*S`` one to three spatial sizes.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from . import arguments
from .attention import AttentionPool
from .layers import (
    SiLU,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from .torso import Torso, cast_convolutions

_HIDDEN = 2048  # width between the two Linears of the spatial pools


class EncoderUNetModel(nn.Module):
    """Classify noisy images: UNetModel's encoder and middle, then one of four pools.

    pool   "adaptive"    norm, SiLU, mean over positions, zeroed 1×1 convolution
           "attention"   norm, SiLU, AttentionPool (needs num_head_channels, and inputs of
                         image_size; in 3D the depth, never resampled, is image_size too)
           "spatial"     the mean of every block's output over its positions, concatenated, then
                         Linear, ReLU, Linear
           "spatial_v2"  the same with Linear, norm, SiLU, Linear

    The other arguments are UNetModel's; out_channels is K, and num_heads_upsample has no decoder
    to act on. Raises ValueError for another pool.
    Keywords, attributes and state-dict keys are those of guided-diffusion
    ``unet.EncoderUNetModel``.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__()
        arguments.integers(
            self, 1, image_size=image_size, in_channels=in_channels, out_channels=out_channels
        )
        arguments.flags(self, use_fp16=use_fp16)
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.conv_resample = conv_resample
        self.dims = dims
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.pool = pool
        torso = Torso(
            owner=type(self).__name__,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=self.num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        arguments.one_of(self, ("adaptive", "attention", "spatial", "spatial_v2"), pool=pool)
        self.channel_mult = tuple(channel_mult)
        self.time_embed = torso.time_embed()
        self.input_blocks, widths = torso.encoder(in_channels)
        self.middle_block = torso.middle()
        C, K = torso.widths[-1], out_channels
        if pool == "adaptive":
            self.out = nn.Sequential(
                normalization(C),
                SiLU(),
                _global_mean_nd(dims),
                zero_module(conv_nd(dims, C, K, 1)),
                nn.Flatten(),
            )
        elif pool == "attention":
            if num_head_channels == -1:
                raise ValueError('EncoderUNetModel: pool="attention" needs num_head_channels')
            side = image_size // 2 ** (len(self.channel_mult) - 1)
            if side == 0:
                raise ValueError(
                    f"EncoderUNetModel: image_size={image_size} leaves nothing to pool after "
                    f"{len(self.channel_mult)} levels; it must be at least "
                    f"{2 ** (len(self.channel_mult) - 1)}"
                )
            tokens = {1: side, 2: side**2, 3: image_size * side**2}[dims]
            self.out = nn.Sequential(
                normalization(C), SiLU(), AttentionPool(tokens, C, num_head_channels, K)
            )
        elif pool == "spatial":
            wide = sum(widths) + C
            self.out = nn.Sequential(linear(wide, _HIDDEN), nn.ReLU(), linear(_HIDDEN, K))
        else:  # "spatial_v2"
            wide = sum(widths) + C
            self.out = nn.Sequential(
                linear(wide, _HIDDEN), normalization(_HIDDEN), SiLU(), linear(_HIDDEN, K)
            )
        if use_fp16:
            self.convert_to_fp16()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in: that of their convolutions."""
        first = next(self.input_blocks.parameters())
        return first.dtype

    def convert_to_fp16(self) -> None:
        """Cast the convolutions of the blocks to float16; all else, the pool too, stays float32."""
        cast_convolutions((self.input_blocks, self.middle_block), torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16 (what float16 rounded away stays lost)."""
        cast_convolutions((self.input_blocks, self.middle_block), torch.float32)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: (N, C, *S), timesteps: (N,) -> (N, K)."""
        t = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(t.to(next(self.time_embed.parameters()).dtype))
        means = []
        h = x.to(self.dtype)
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.to(x.dtype).flatten(2).mean(dim=2))
        out: Tensor = self.out(torch.cat(means, dim=1) if means else h.to(x.dtype))
        return out


def _global_mean_nd(dims: int) -> nn.Module:
    pools: tuple[type[nn.Module], ...]
    pools = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    return pools[dims - 1](1)
