"""The residual block of improved- and guided-diffusion, and what carries the embedding to it.

References
    Nichol & Dhariwal, arXiv:2102.09672 (the block, scale-shift norm)
    Dhariwal & Nichol, arXiv:2105.05233 (resampling inside the block)
    Perez et al., FiLM, arXiv:1709.07871 (the modulation that scale-shift norm is)

Shapes: N batch, C channels, E width of the timestep embedding, ``*S`` one to three spatial sizes.
In three dimensions only the inner two sizes are ever resampled.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments
from .checkpoint import checkpoint
from .layers import (
    SiLU,
    avg_pool_nd,
    conv_nd,
    linear,
    normalization,
    zero_module,
)


class TimestepBlock(nn.Module):
    """Marks a module whose forward takes the timestep embedding: ``forward(x, emb)``."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, C, *S), emb: (N, E) -> (N, C', *S')."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, emb)")


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands ``(x, emb)`` to its TimestepBlocks and ``(x)`` to other children.

    It is a TimestepBlock itself, so sequences nest. The class of a child decides, hence a wrapper
    that is no TimestepBlock would take its block out of the embedding's reach; forward raises
    TypeError for a child which hides a TimestepBlock that way.
    """

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for i, child in enumerate(self):
            if isinstance(child, TimestepBlock):
                x = child(x, emb)
            else:
                for inner in child.modules():
                    if isinstance(inner, TimestepBlock):
                        raise TypeError(_hidden_block_message(i, child, inner))
                x = child(x)
        return x


def _hidden_block_message(index: int, child: nn.Module, inner: nn.Module) -> str:
    wrapper, block = type(child).__name__, type(inner).__name__
    return (
        f"TimestepEmbedSequential: child {index} is of class {wrapper}, which is no TimestepBlock "
        f"but contains one ({block}). Children are told apart by class, so the {block} inside "
        "would be called without its timestep embedding. Compile a block in place "
        "(block.compile() instead of torch.compile(block)), wrap the whole model rather than a "
        "block (DDP), nest with TimestepEmbedSequential instead of nn.Sequential, or let the "
        "wrapper subclass TimestepBlock and forward (x, emb)"
    )


class Upsample(nn.Module):
    """Nearest-neighbour ×2, then a 3×3 convolution if ``use_conv``.

    x: (N, C, *S) -> (N, C_out, *2S); in 3D (N, C, D, H, W) -> (N, C_out, D, 2H, 2W).
    Raises ValueError for a width that only a convolution could change, or a wrong input width.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ) -> None:
        super().__init__()
        _check_resampling(self, channels, use_conv, dims, out_channels)
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            _refuse_new_width(self, channels, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.channels)
        scale = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
        x = F.interpolate(x, scale_factor=scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the size: a 3×3 convolution of stride 2 if ``use_conv``, else the mean of 2×2.

    x: (N, C, *S) -> (N, C_out, *S/2); in 3D (N, C, D, H, W) -> (N, C_out, D, H/2, W/2). An odd
    size is rounded up by the convolution and down by the mean.
    Raises ValueError for a width that only a convolution could change, or a wrong input width.
    (improved-diffusion's version raises for every ``use_conv=False``.)
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ) -> None:
        super().__init__()
        _check_resampling(self, channels, use_conv, dims, out_channels)
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        step = (1, 2, 2) if dims == 3 else 2
        self.op: nn.Module
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=step, padding=1)
        else:
            _refuse_new_width(self, channels, self.out_channels)
            self.op = avg_pool_nd(dims, kernel_size=step, stride=step)

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self, x, self.channels)
        out: Tensor = self.op(x)
        return out


class ResBlock(TimestepBlock):
    """The residual block of IDDPM and ADM, conditioned on a timestep embedding.

        h = conv(up_or_down(silu(norm(x))))                         in_layers, h_upd
        e = W·silu(emb) + b                                         emb_layers
        h = norm(h)·(1 + scale) + shift, [scale, shift] = e         with use_scale_shift_norm
        h = norm(h + e)                                             without
        h = conv0(dropout(silu(h)))                                 out_layers; conv0 starts at 0
        y = skip(up_or_down(x)) + h                                 skip_connection, x_upd

    channels              C_in, of x; a multiple of 32
    emb_channels          E, of emb
    dropout               probability in [0, 1)
    out_channels          C_out, default C_in; a multiple of 32
    use_conv              where C_in ≠ C_out, a 3×3 skip convolution instead of 1×1
    use_scale_shift_norm  modulate after the norm instead of adding before it
    dims                  1, 2 or 3 spatial dimensions
    use_checkpoint        keep only x and emb for the backward, recompute the rest
    up, down              resample ×2 or ×½ inside the block; at most one of them

    x: (N, C_in, *S), emb: (N, E) -> (N, C_out, *S'). The embedding branch computes in the dtype
    of its Linear and is cast to h's. Raises ValueError for arguments or inputs outside of this.
    Source: guided-diffusion ``unet.ResBlock``, whose state-dict keys these are.
    """

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
        arguments.integers(self, 1, channels=channels, emb_channels=emb_channels)
        arguments.probabilities(self, dropout=dropout)
        if out_channels is not None:
            arguments.integers(self, 1, out_channels=out_channels)
        arguments.one_of(self, (1, 2, 3), dims=dims)
        arguments.flags(
            self,
            use_conv=use_conv,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
            up=up,
            down=down,
        )
        if up and down:
            raise ValueError("ResBlock: up and down are both True; at most one may be")
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.dims = dims
        self.updown = up or down
        C_in, C_out = channels, self.out_channels

        self.in_layers = nn.Sequential(
            normalization(C_in), SiLU(), conv_nd(dims, C_in, C_out, 3, padding=1)
        )
        self.h_upd: nn.Module
        self.x_upd: nn.Module
        if up:
            self.h_upd, self.x_upd = Upsample(C_in, False, dims), Upsample(C_in, False, dims)
        elif down:
            self.h_upd, self.x_upd = Downsample(C_in, False, dims), Downsample(C_in, False, dims)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        self.emb_layers = nn.Sequential(
            SiLU(), linear(emb_channels, 2 * C_out if use_scale_shift_norm else C_out)
        )
        self.out_layers = nn.Sequential(
            normalization(C_out),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, C_out, C_out, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if C_out == C_in:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, C_in, C_out, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, C_in, C_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, C_in, *S), emb: (N, E) -> (N, C_out, *S')."""
        check_channels(self, x, self.channels)
        check_embedding(self, emb, self.emb_channels)
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, in_act, in_conv = self.in_layers
        # Norm and activation run at the input's resolution, the convolution at the output's.
        h: Tensor = in_conv(self.h_upd(in_act(in_norm(x))))  # (N, C_out, *S')
        e: Tensor = self.emb_layers(emb).to(h.dtype)
        e = e.reshape(*e.shape, *(1 for _ in h.shape[2:]))  # (N, C_out or 2·C_out, 1, …)
        out_norm, out_act, out_drop, out_conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
        else:
            h = out_norm(h + e)
        h = out_conv(out_drop(out_act(h)))
        skip: Tensor = self.skip_connection(self.x_upd(x))
        return skip + h


def _check_resampling(
    module: nn.Module, channels: int, use_conv: bool, dims: int, out_channels: int | None
) -> None:
    arguments.integers(module, 1, channels=channels)
    if out_channels is not None:
        arguments.integers(module, 1, out_channels=out_channels)
    arguments.one_of(module, (1, 2, 3), dims=dims)
    arguments.flags(module, use_conv=use_conv)


def _refuse_new_width(module: nn.Module, channels: int, out_channels: int) -> None:
    if channels != out_channels:
        raise ValueError(
            f"{type(module).__name__}: {channels} -> {out_channels} channels needs use_conv=True; "
            "without a convolution the number of channels stays"
        )


def check_channels(module: nn.Module, x: Tensor, channels: int) -> None:
    if not isinstance(x, Tensor) or x.ndim < 3:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else arguments.received(x)
        raise TypeError(
            f"{type(module).__name__}: x must be a tensor of shape (N, {channels}, *spatial), got "
            + got
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"{type(module).__name__}: x has shape {tuple(x.shape)}, that is {x.shape[1]} "
            f"channels, but the module was built for {channels}; dimension 1 of x must be "
            f"{channels}"
        )


def check_embedding(module: nn.Module, emb: Tensor, emb_channels: int) -> None:
    if emb.ndim != 2 or emb.shape[1] != emb_channels:
        raise ValueError(
            f"{type(module).__name__}: emb has shape {tuple(emb.shape)}, but must be "
            f"(N, {emb_channels}); pass the embedding of width emb_channels={emb_channels} that "
            "the model's time_embed gives"
        )
