"""The residual block of improved-diffusion and guided-diffusion, and of what descends from them.

Known by its structure; the packages are not needed. The block calls its embedding layers, its skip
and convolutions that are more than their parameters, and computes the rest itself. Its checkpoint
is this project's: theirs is wrong with dropout and fails with frozen weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resblock_bench.kernels.alterations import (
    CONVOLUTIONS,
    Layers,
    altered_layers,
    is_exactly,
    is_untouched,
)
from resblock_bench.kernels.blocks import FusedResBlock
from resblock_bench.kernels.resample import Direction, Resample
from resblock_bench.reference.checkpoint import checkpoint

from .family import (
    EVERYTHING_DROPPED,
    Context,
    Found,
    called,
    checkpoint_attributes,
    describe_block,
    features_of,
    parameter_of,
    random_like,
    unfused_class,
)
from .norm import channels_of, is_norm, is_silu
from .trial import agree, aside, bare, public_attributes, randomised, trial

_ATTRIBUTES = {
    "channels", "emb_channels", "dropout", "out_channels", "use_conv", "use_checkpoint",
    "use_scale_shift_norm", "updown",
}  # fmt: skip
_CHILDREN = {"in_layers", "emb_layers", "out_layers", "skip_connection", "h_upd", "x_upd"}


class FusedOpenAIBlock(FusedResBlock):
    """Mixin of an OpenAI ResBlock, which runs as it was where its layers are others than then."""

    _layers: Layers
    _resampling: tuple[Direction | None, list[type[nn.Module]]]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), (), self.use_checkpoint)

    def _alteration(self) -> str | None:
        block = cast(Any, self)
        if "forward" in vars(block) or "_forward" in vars(block):
            return "it has a forward of its own"
        direction, classes = self._resampling
        if direction is not None and _classes(block.h_upd) != classes:
            return "h_upd was replaced or has hooks"
        if (found := altered_layers(block, self._layers)) is not None:
            return found
        return EVERYTHING_DROPPED if block.out_layers[2].p == 1 else None

    def _direction(self) -> Direction | None:
        return self._resampling[0]

    def _skip(self, x: Tensor) -> Tensor:
        if self._direction() is not None:
            x = cast(Any, self).x_upd(x)
        out: Tensor = self.skip_connection(x)
        return out


def recognise(module: nn.Module, context: Context) -> Found | None:
    block = cast(Any, module)
    if not hasattr(module, "use_scale_shift_norm") or not all(
        isinstance(getattr(module, name, None), nn.Sequential)
        for name in ("in_layers", "emb_layers", "out_layers")
    ):
        return None
    parts = [m for layers in (block.in_layers, block.out_layers) for m in layers.modules()]
    name = type(module).__name__
    if (why := _altered(block)) is not None:
        return Found(None, f"{name} is not as built: {why}", parts)
    updown = getattr(block, "updown", None)
    why = _trial(unfused_class(module), bool(block.use_scale_shift_norm), updown)
    if why is not None:
        return Found(None, why, parts)
    if isinstance(module, FusedOpenAIBlock):
        mode = context.mode(module.checkpoint)
    else:
        mode = context.mode("full" if getattr(block, "use_checkpoint", False) else "none")
    layers: Layers = {
        "in_layers": (*((type(layer),) for layer in block.in_layers[:2]), None),
        "out_layers": (*((type(layer),) for layer in block.out_layers[:3]), None),
    }
    resampling = (_direction(block), _classes(block.h_upd)) if updown else (None, [])
    attributes = {
        **checkpoint_attributes(mode),
        "_layers": layers,
        "_resampling": resampling,
    }
    convolutions = {"in_layers.2": block.in_layers[2], "out_layers.3": block.out_layers[3]}
    what = describe_block(name, mode, called(convolutions))
    return Found(FusedOpenAIBlock, what, parts, attributes, _inputs)


def _altered(block: Any) -> str | None:
    """What in a block is not as OpenAI's class builds it."""
    if "forward" in vars(block) or "_forward" in vars(block):
        return "it has a forward of its own"
    children = {name for name, _ in block.named_children()}
    if more := (public_attributes(block) - _ATTRIBUTES) | (children - _CHILDREN):
        return f"OpenAI's block has no {', '.join(sorted(more))}"
    for name, count in (("in_layers", 3), ("out_layers", 4)):
        layers = getattr(block, name)
        if not is_exactly(layers, (nn.Sequential,)) or len(layers) != count:
            return f"{name} has not the {count} layers that the class builds, or has hooks"
        norm, activation, *rest = layers
        if not is_norm(norm):
            return f"{name}.0 ({type(norm).__name__}) is no group norm that is known, or has hooks"
        if not is_silu(activation):
            return f"{name}.1 ({type(activation).__name__}) is no SiLU, or has hooks"
        if count == 4 and not is_exactly(rest[0], (nn.Dropout,)):
            return f"{name}.2 ({type(rest[0]).__name__}) is no Dropout, or has hooks"
        if count == 4 and rest[0].p == 1:
            return EVERYTHING_DROPPED
    if getattr(block, "updown", False) and _direction(block) is None:
        return f"h_upd ({type(block.h_upd).__name__}) is no plain resampling by 2, or has hooks"
    return None


def _direction(block: Any) -> Direction | None:
    """Which way h_upd resamples, found by trying; None where it does something else."""
    h_upd: nn.Module = block.h_upd
    if next(h_upd.parameters(), None) is not None:
        return None
    if len(_classes(h_upd)) < sum(1 for _ in h_upd.modules()):
        return None
    with aside():
        x = torch.randn(1, channels_of(block.in_layers[0]), *(4,) * _dims(block))
        try:
            y = h_upd(x)
        except Exception:  # whatever code that nobody here wrote raises
            return None
        directions: tuple[Direction, ...] = ("up", "down")
        return next((d for d in directions if agree(y, Resample(d).forward(x))), None)


def _classes(module: nn.Module) -> list[type[nn.Module]]:
    """Of the module and those in it, without those in which something else happens."""
    return [type(m) for m in module.modules() if is_untouched(m)]


def _dims(block: Any) -> int:
    convolutions = (m for m in block.in_layers[2].modules() if isinstance(m, CONVOLUTIONS))
    return len(next((conv.kernel_size for conv in convolutions), (1, 1)))


def _inputs(block: Any) -> tuple[Tensor, Tensor]:
    channels = channels_of(block.in_layers[0])
    return (
        random_like(parameter_of(block.in_layers[2]), 2, channels, *(8,) * _dims(block)),
        random_like(parameter_of(block.emb_layers), 2, features_of(block.emb_layers)),
    )


@trial
def _trial(cls: type[nn.Module], scale_shift: bool, updown: bool | None) -> str | None:
    """Whether the class's forward is OpenAI's.

    The layers stand in for those of the class, with others where these would not show an order:
    the mean and the largest for the resampling of h and x, a tanh for the dropout.
    """
    block = bare(
        cls, channels=4, emb_channels=3, dropout=0.0, out_channels=6, use_conv=False,
        use_checkpoint=False, use_scale_shift_norm=scale_shift,
    )  # fmt: skip
    if updown is not None:
        block.updown = updown
        block.h_upd = nn.AvgPool2d(2) if updown else nn.Identity()
        block.x_upd = nn.MaxPool2d(2) if updown else nn.Identity()
    block.in_layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 6, 3, padding=1))
    block.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(3, 12 if scale_shift else 6))
    block.out_layers = nn.Sequential(
        nn.GroupNorm(2, 6), nn.SiLU(), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1)
    )
    block.skip_connection = nn.Conv2d(4, 6, 1)
    randomised(block)
    x, emb = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 3).double()
    found = block(x, emb)

    def resampled(t: Tensor, pool: Any) -> Tensor:
        return pool(t, 2) if updown else t

    norm, _, conv = block.in_layers
    h = conv(resampled(F.silu(norm(x)), F.avg_pool2d))
    e = block.emb_layers(emb)[:, :, None, None]
    norm, _, _, conv = block.out_layers
    if scale_shift:
        scale, shift = e.chunk(2, dim=1)
        h = norm(h) * (1 + scale) + shift
    else:
        h = norm(h + e)
    h = conv(torch.tanh(F.silu(h)))
    expected = block.skip_connection(resampled(x, F.max_pool2d)) + h
    return None if agree(found, expected) else f"{cls.__name__} computes otherwise than OpenAI's"
