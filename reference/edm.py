"""EDM's two U-Nets: its re-implemented ADM, and DDPM++.

References
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    arXiv:2206.00364 (table 7: the two networks and their initialisation)
    Song et al., Score-Based Generative Modeling through SDEs, arXiv:2011.13456 (DDPM++)

Shapes: N batch, C channels, E width of the embedding, H, W sizes.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments
from .blocks import TimestepBlock
from .edm_block import EDMBlock, edm_group_norm
from .layers import timestep_embedding, zero_module

Variant = Literal["adm", "ddpmpp"]


class EDMUNet(nn.Module):
    """EDM's U-Nets: the re-implemented ADM ("adm") and DDPM++ ("ddpmpp").

                      adm                               ddpmpp
        embedding     cos, sin; class added last        sin, cos; class added first
        conditioning  scale and shift                   addition before the norm
        skip_scale    1                                 sqrt(1/2)
        eps           1e-5                              1e-6
        attention     64 channels a head; every         one head; last decoder block of a
                      block of a resolution             resolution only
        first conv    channel_mult[0]·model_channels    model_channels
        resampling    no skip convolution               1×1 skip convolution

    img_resolution     H = W, which attn_resolutions (in pixels) refer to
    in_channels, out_channels, model_channels, channel_mult, dropout   as in UNetModel
    label_dim          number of classes, 0 for none
    augment_dim        width of the augmentation labels, 0 for none
    channel_mult_emb   E = channel_mult_emb · model_channels
    num_blocks         n: blocks of one encoder level (the decoder has n + 1)

    This is the bare network F of the paper, without its preconditioning.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        variant: Variant,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Collection[int] = (32, 16, 8),
        dropout: float = 0.10,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        arguments.one_of(self, ("adm", "ddpmpp"), variant=variant)
        arguments.integers(
            self,
            1,
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
        )
        arguments.integers(self, 4, model_channels=model_channels)
        arguments.integers(self, 0, label_dim=label_dim, augment_dim=augment_dim)
        arguments.multipliers(self, channel_mult=channel_mult)
        arguments.integer_collections(self, 1, attn_resolutions=attn_resolutions)
        arguments.probabilities(self, dropout=dropout)
        arguments.flags(self, use_checkpoint=use_checkpoint)
        if img_resolution >> (len(channel_mult) - 1) == 0:
            raise ValueError(
                f"EDMUNet: img_resolution={img_resolution} cannot be halved for "
                f"{len(channel_mult)} levels; it must be at least {2 ** (len(channel_mult) - 1)}"
            )
        self.img_resolution = img_resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.variant = variant
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.model_channels = model_channels
        adm = variant == "adm"
        E = channel_mult_emb * model_channels
        eps = 1e-5 if adm else 1e-6

        settings: dict[str, Any] = {
            "num_heads": None if adm else 1,
            "dropout": dropout,
            "skip_scale": 1.0 if adm else math.sqrt(0.5),
            "eps": eps,
            "resample_proj": not adm,
            "adaptive_scale": adm,
            "use_checkpoint": use_checkpoint,
        }

        def block(c_in: int, c_out: int, **role: bool) -> EDMBlock:
            return EDMBlock(c_in, c_out, E, **role, **settings)

        if label_dim:
            self.map_label = nn.Linear(label_dim, E if adm else model_channels, bias=not adm)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = nn.Linear(model_channels, E)
        self.map_layer1 = nn.Linear(E, E)

        widths = [int(mult * model_channels) for mult in channel_mult]
        self.enc = nn.ModuleDict()
        c = widths[0] if adm else model_channels
        skips = [c]
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = nn.Conv2d(in_channels, c, 3, padding=1)
            else:
                self.enc[f"{res}x{res}_down"] = block(c, c, down=True)
                skips.append(c)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(c, width, attention=attention)
                c = width
                skips.append(c)

        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(c, c, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(c, c)
            else:
                self.dec[f"{res}x{res}_up"] = block(c, c, up=True)
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions and (adm or i == num_blocks)
                name = f"{res}x{res}_block{i}"
                self.dec[name] = block(c + skips.pop(), width, attention=attention)
                c = width

        if adm:
            self.out_norm = edm_group_norm(c, eps)
            self.out_conv = zero_module(nn.Conv2d(c, out_channels, 3, padding=1))
        else:
            self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = edm_group_norm(c, eps)
            aux_conv = nn.Conv2d(c, out_channels, 3, padding=1)
            self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = aux_conv
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """The initialisation of the paper; ADM's differs from PyTorch's in two layers only."""
        if self.variant == "adm":
            if self.label_dim:
                nn.init.normal_(self.map_label.weight)
            if self.augment_dim:
                zero_module(self.map_augment)
            return
        for name, m in self.named_modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                last = name.endswith((".conv1", ".proj", "_aux_conv"))
                gain = 1e-5 if last else math.sqrt(0.2) if name.endswith(".qkv") else 1.0
                nn.init.xavier_uniform_(m.weight, gain)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Apply the network.

        x: (N, C, H, W); timesteps: (N,), log(σ)/4 in the paper; y: (N,) class
        indices or (N, label_dim) one-hot rows, a zero row standing for no class; augment_labels:
        (N, augment_dim) or None -> (N, out_channels, H, W).
        Raises ValueError unless y is given exactly where the model has classes.
        """
        emb = self._embed(x, timesteps, y, augment_labels)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, TimestepBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if not isinstance(block, TimestepBlock):
                continue  # the output layers of ddpmpp
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        norm: nn.Module
        conv: nn.Module
        if self.variant == "adm":
            norm, conv = self.out_norm, self.out_conv
        else:
            norm, conv = list(self.dec.values())[-2:]  # _aux_norm, _aux_conv
        out: Tensor = conv(F.silu(norm(x)))
        return out

    def _embed(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """(N, E), activated: what every block takes."""
        weight = self.map_layer0.weight
        labels = self._one_hot(x, y)
        if self.variant == "adm":
            emb = timestep_embedding(timesteps, self.model_channels).to(weight)
        else:
            emb = _sine_first_embedding(timesteps, self.model_channels).to(weight)
            if labels is not None:
                # Rows of unit variance: a one-hot row of label_dim entries has 1/label_dim.
                emb = emb + self.map_label(labels.to(weight) * math.sqrt(self.label_dim))
        if augment_labels is not None:
            if not self.augment_dim:
                raise ValueError("EDMUNet: augment_labels were given, but augment_dim is 0")
            emb = emb + self.map_augment(augment_labels.to(weight))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.variant == "adm" and labels is not None:
            emb = emb + self.map_label(labels.to(weight))
        return F.silu(emb)

    def _one_hot(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        if (y is None) != (self.label_dim == 0):
            raise ValueError(
                f"EDMUNet: the model has label_dim={self.label_dim}, so y must be "
                f"{'given (zero rows for no class)' if self.label_dim else 'None'}"
            )
        if y is None:
            return None
        if y.ndim == 1:
            y = F.one_hot(y, self.label_dim)
        if y.shape != (x.shape[0], self.label_dim):
            raise ValueError(
                f"EDMUNet: y must have shape ({x.shape[0]},) or "
                f"({x.shape[0]}, {self.label_dim}), got {tuple(y.shape)}"
            )
        return y


def _sine_first_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """DDPM++'s [sin(t·ω_i) …, cos(t·ω_i) …], ω_i = max_period^(−i/(half − 1)): (N,) -> (N, dim)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angle = t.float()[:, None] * max_period**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=1)
