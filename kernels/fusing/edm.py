"""The residual block of EDM's original networks (NVlabs/edm).

Known by its structure; their code is not needed. Their convolutions and norms are classes of their
own, which cast their weights to the dtype of the input. A convolution with the filter [1, 1], or
without resampling, is its parameters alone; another one is called, and keeps its input.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resblock_bench.kernels.alterations import is_untouched
from resblock_bench.kernels.blocks import FusedBlock, add, embeds
from resblock_bench.kernels.op import Convolution, Kernel
from resblock_bench.kernels.resample import Direction, Resample
from resblock_bench.reference.checkpoint import checkpoint

from .family import (
    EVERYTHING_DROPPED,
    Context,
    Found,
    checkpoint_attributes,
    describe_block,
    features_of,
    named,
    parameter_of,
    random_like,
    unfused_class,
)
from .norm import channels_of, is_norm
from .trial import agree, bare, public_attributes, randomised, trial

_ATTRIBUTES = {
    "in_channels", "out_channels", "emb_channels", "num_heads", "dropout", "skip_scale",
    "adaptive_scale", "skip",
}  # fmt: skip
_CHILDREN = {"norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"}
_CONVOLUTION = {"in_channels", "out_channels", "up", "down", "fused_resample"}


class FusedEDMBlock(FusedBlock):
    """Mixin of EDM's UNetBlock, which runs as it was where its norms are others than then.

    What it was made of is kept as modules, not as classes: a network of EDM's brings its classes
    along when it is pickled.
    """

    norm0: nn.GroupNorm
    norm1: nn.GroupNorm
    conv0: nn.Module
    conv1: nn.Module
    affine: nn.Module
    skip: nn.Module | None
    num_heads: int
    dropout: float
    skip_scale: float
    adaptive_scale: bool
    training: bool

    _norms: tuple[nn.Module, nn.Module]
    _plain: tuple[nn.Module | None, ...]
    """Those of conv0 and conv1 that are their parameters alone."""
    _convolution_resamples = True

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), (), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not (
            self.norm0 is self._norms[0]
            and self.norm1 is self._norms[1]
            and is_untouched(self.norm0)
            and is_untouched(self.norm1)
            and self.dropout < 1
            and embeds(emb, x)
        ):
            y: Tensor = super().forward(x, emb)  # type: ignore[misc]
            return y
        h, bias = self._residual_branch(
            x,
            self.affine(emb),
            (self.norm0, self.conv0),
            (self.norm1, self.conv1),
            modulated=self.adaptive_scale,
            dropout_p=self.dropout if self.training else 0.0,
            resample=_direction(self.conv0),
        )
        # Theirs adds in place: in h's dtype.
        y = add(x if self.skip is None else self.skip(x), h, bias, self.skip_scale).to(h.dtype)
        return self._attend(y) if self.num_heads else y

    def _kernel(self, conv: nn.Module, x: Tensor) -> Kernel | None:
        if not (conv is self._plain[0] or conv is self._plain[1]) or not is_untouched(conv):
            return None
        weight, bias = cast("tuple[Tensor, Tensor | None]", (conv.weight, conv.bias))
        half = weight.shape[-1] // 2
        constants = Convolution((1, 1), (half, half), (1, 1), 1)
        return Kernel(weight.to(x.dtype), None if bias is None else bias.to(x.dtype), constants)

    def _attend(self, y: Tensor) -> Tensor:
        block, (N, C, H, W) = cast(Any, self), y.shape
        c = C // self.num_heads
        qkv = block.qkv(block.norm2(y)).reshape(N, self.num_heads, c, 3, H * W)
        q, k, v = qkv.unbind(3)  # each (N, heads, c, T)
        at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
        k = (k / math.sqrt(c)).to(at_least_fp32)
        logits = q.to(at_least_fp32).transpose(-1, -2) @ k  # (N, heads, T of q, T of k)
        weight = logits.softmax(dim=-1).to(v.dtype)
        a = (v @ weight.transpose(-1, -2)).reshape(N, C, H, W)
        out: Tensor = (block.proj(a) + y) * self.skip_scale
        return out


def recognise(module: nn.Module, context: Context) -> Found | None:
    block = cast(Any, module)
    children = {name for name, _ in module.named_children()}
    if not children >= {"norm0", "conv0", "affine", "norm1", "conv1"}:
        return None
    if not hasattr(module, "adaptive_scale") or not hasattr(module, "skip_scale"):
        return None
    parts = [block.norm0, block.norm1]
    name = type(module).__name__
    if (why := _altered(block, children)) is not None:
        return Found(None, f"{name} is not as built: {why}", parts)
    why = _trial(unfused_class(module), bool(block.adaptive_scale))
    if why is not None:
        return Found(None, why, parts)
    mode = context.mode(module.checkpoint if isinstance(module, FusedEDMBlock) else "none")
    convolutions = {"conv0": block.conv0, "conv1": block.conv1}
    attributes = {
        **checkpoint_attributes(mode),
        "_norms": (block.norm0, block.norm1),
        "_plain": tuple(c if _is_plain(c) else None for c in convolutions.values()),
    }
    kept = [named(n, c) for n, c in convolutions.items() if not _is_plain(c)]
    what = describe_block(name, mode, kept)
    return Found(FusedEDMBlock, what, parts, attributes, _inputs)


def _altered(block: Any, children: set[str]) -> str | None:
    """What in a block is not as EDM's class builds it."""
    if "forward" in vars(block):
        return "it has a forward of its own"
    if more := (public_attributes(block) - _ATTRIBUTES) | (children - _CHILDREN):
        return f"EDM's block has no {', '.join(sorted(more))}"
    for name in ("norm0", "norm1"):
        if not is_norm(norm := getattr(block, name)):
            return f"{name} ({type(norm).__name__}) is no group norm that is known, or has hooks"
    return None if block.dropout < 1 else EVERYTHING_DROPPED


def _is_plain(conv: Any) -> bool:
    """Whether a convolution of EDM's class is its parameters alone, after a plain resampling."""
    if not is_untouched(conv) or public_attributes(conv) - _CONVOLUTION:
        return False
    if not all(hasattr(conv, name) for name in (*_CONVOLUTION, "weight", "bias")):
        return False
    if conv.fused_resample or conv.weight is None:
        return False
    if {name for name, _ in conv.named_parameters()} - {"weight", "bias"}:
        return False
    if conv.up or conv.down:
        taps = getattr(conv, "resample_filter", None)
        if type(taps) is not Tensor or taps.is_meta or taps.shape != (1, 1, 2, 2):
            return False
        if (conv.up and conv.down) or not bool((taps == 0.25).all()):
            return False
    return _convolution_trial(type(conv), _direction(conv)) is None


def _direction(conv: Any) -> Direction | None:
    if getattr(conv, "up", False):
        return "up"
    return "down" if getattr(conv, "down", False) else None


def _inputs(block: Any) -> tuple[Tensor, Tensor]:
    return (
        random_like(parameter_of(block.conv0), 2, channels_of(block.norm0), 8, 8),
        random_like(parameter_of(block.affine), 2, features_of(block.affine)),
    )


@trial
def _convolution_trial(cls: type[nn.Module], direction: Direction | None) -> str | None:
    """Whether a convolution's class resamples before it convolves, both as the operator does."""
    conv = bare(
        cls, in_channels=3, out_channels=2, up=direction == "up", down=direction == "down",
        fused_resample=False, weight=nn.Parameter(torch.empty(2, 3, 3, 3)),
        bias=nn.Parameter(torch.empty(2)),
    )  # fmt: skip
    taps = None if direction is None else torch.full((1, 1, 2, 2), 0.25)
    conv.register_buffer("resample_filter", taps)
    randomised(conv)
    x = torch.randn(2, 3, 4, 4).double()
    expected = F.conv2d(Resample(direction).forward(x), conv.weight, conv.bias, padding=1)
    return None if agree(conv(x), expected) else f"{cls.__name__} is another convolution"


@trial
def _trial(cls: type[nn.Module], adaptive_scale: bool) -> str | None:
    """Whether the class's forward is that of EDM's block, its attention too."""
    block = bare(
        cls, in_channels=4, out_channels=8, emb_channels=3, num_heads=2, dropout=0.0,
        skip_scale=0.5, adaptive_scale=adaptive_scale,
    )  # fmt: skip
    block.norm0, block.conv0 = nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 3, padding=1)
    block.affine = nn.Linear(3, 16 if adaptive_scale else 8)
    block.norm1, block.conv1 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
    block.skip = nn.Conv2d(4, 8, 1)
    block.norm2, block.qkv, block.proj = nn.GroupNorm(2, 8), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)
    randomised(block)
    x, emb = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 3).double()
    h = block.conv0(F.silu(block.norm0(x)))
    e = block.affine(emb)[:, :, None, None]
    if adaptive_scale:
        scale, shift = e.chunk(2, dim=1)
        h = F.silu(block.norm1(h) * (1 + scale) + shift)
    else:
        h = F.silu(block.norm1(h + e))
    y = (block.skip(x) + block.conv1(h)) * 0.5
    q, k, v = block.qkv(block.norm2(y)).reshape(2, 2, 4, 3, 16).unbind(3)
    weight = (q.transpose(-1, -2) @ k / 2).softmax(dim=-1)
    a = (v @ weight.transpose(-1, -2)).reshape(2, 8, 4, 4)
    expected = (y + block.proj(a)) * 0.5
    return (
        None if agree(block(x, emb), expected) else f"{cls.__name__} computes otherwise than EDM's"
    )
