"""The U-Net of IDDPM and ADM, and its super-resolution form.

References
    Nichol & Dhariwal, arXiv:2102.09672
    Dhariwal & Nichol, arXiv:2105.05233

Shapes: N batch, C channels, E = 4 · model_channels, ``*S`` one to three spatial sizes.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments
from .layers import (
    SiLU,
    conv_nd,
    normalization,
    timestep_embedding,
    zero_module,
)
from .torso import Torso, cast_convolutions


class UNetModel(nn.Module):
    """Predict the noise (and, with twice the output channels, the variance) of noisy images.

    image_size                the size that the model is meant for; kept, not used
    in_channels               C of x
    model_channels            base width; level l has int(channel_mult[l] · model_channels)
    out_channels              C of the output
    num_res_blocks            n: blocks of one encoder level (the decoder has n + 1)
    attention_resolutions     downsampling rates with attention: 4 means at a quarter of the size
    dropout                   of every ResBlock
    channel_mult              one multiplier a level
    conv_resample             learned convolutions in the resampling between levels
    dims                      1, 2 or 3 spatial dimensions
    num_classes               size of the label embedding, or None
    use_checkpoint            recompute ResBlocks and AttentionBlocks in the backward
    use_fp16                  start with the convolutions in float16, see convert_to_fp16
    num_heads                 attention heads, unless num_head_channels is given
    num_head_channels         channels a head, or −1
    num_heads_upsample        heads in the decoder, −1 for num_heads
    use_scale_shift_norm      see ResBlock
    resblock_updown           resample inside ResBlocks instead of by Downsample and Upsample
    use_new_attention_order   see qkv_attention

    Keywords, attributes and state-dict keys are those of guided-diffusion ``unet.UNetModel``.
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
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        arguments.integers(
            self, 1, image_size=image_size, in_channels=in_channels, out_channels=out_channels
        )
        arguments.flags(self, use_fp16=use_fp16)
        if num_classes is not None:
            arguments.integers(self, 1, num_classes=num_classes)
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
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
        self.channel_mult = tuple(channel_mult)
        self.time_embed = torso.time_embed()
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, torso.emb_channels)
        self.input_blocks, skips = torso.encoder(in_channels)
        self.middle_block = torso.middle()
        self.output_blocks = torso.decoder(skips)
        c = torso.widths[0]
        self.out = nn.Sequential(
            normalization(c), SiLU(), zero_module(conv_nd(dims, c, out_channels, 3, padding=1))
        )
        if use_fp16:
            self.convert_to_fp16()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in: that of their convolutions."""
        first = next(self.input_blocks.parameters())
        return first.dtype

    def convert_to_fp16(self) -> None:
        """Cast the convolutions of the blocks to float16.

        Norms, Linears, the label embedding and the output convolution stay float32. Whoever keeps
        float32 master weights must copy them before this.
        """
        cast_convolutions(self._torso_modules(), torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16 (what float16 rounded away stays lost)."""
        cast_convolutions(self._torso_modules(), torch.float32)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (N, C, *S), timesteps: (N,), y: (N,) class indices -> (N, out_channels, *S).

        y is given if and only if the model has classes, and every resampled size is a multiple of
        2^(levels − 1); ValueError otherwise.
        """
        self._check_sizes(x)
        emb = self._embed(x, timesteps, y)  # (N, E)
        skips = []
        h = x.to(self.dtype)
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.out(h.to(x.dtype))
        return out

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        t = timestep_embedding(timesteps, self.model_channels)
        emb: Tensor = self.time_embed(t.to(next(self.time_embed.parameters()).dtype))
        if self.num_classes is None:
            if y is not None:
                raise ValueError("UNetModel: y was given, but the model has num_classes=None")
            return emb
        if y is None or y.shape != x.shape[:1]:
            got = "None" if y is None else f"shape {tuple(y.shape)}"
            raise ValueError(
                f"UNetModel: the model has num_classes={self.num_classes}, so y must hold "
                f"{x.shape[0]} class indices of shape ({x.shape[0]},), got {got}"
            )
        emb = emb + self.label_emb(y)
        return emb

    def _check_sizes(self, x: Tensor) -> None:
        step = 2 ** (len(self.channel_mult) - 1)
        for size in x.shape[3:] if self.dims == 3 else x.shape[2:]:
            if size % step:
                raise ValueError(
                    f"UNetModel: x has shape {tuple(x.shape)}, but {len(self.channel_mult)} levels "
                    f"need sizes that are multiples of {step}, or the decoder's maps will not "
                    "match the encoder's; pad or crop x"
                )

    def _torso_modules(self) -> tuple[nn.Module, ...]:
        return self.input_blocks, self.middle_block, self.output_blocks


class SuperResModel(UNetModel):
    """A UNetModel that sees a low-resolution image beside its noisy input.

    The arguments are UNetModel's; ``in_channels`` counts one of the two images.
    Source: guided-diffusion ``unet.SuperResModel``.
    """

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        arguments.integers(self, 1, in_channels=in_channels)
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """x: (N, C, *S), low_res: (N, C, *s), resized to *S (bi)linearly -> (N, out_channels, *S).

        Raises ValueError without low_res.
        """
        if low_res is None:
            raise ValueError("SuperResModel: low_res is missing; pass the image to upsample")
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[self.dims]
        low_res = F.interpolate(low_res, x.shape[2:], mode=mode)
        return super().forward(torch.cat([x, low_res], dim=1), timesteps, y)
