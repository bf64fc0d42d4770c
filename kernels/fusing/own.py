"""The blocks of this project."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resblock_bench import reference
from resblock_bench.kernels.alterations import alteration, called
from resblock_bench.kernels.blocks import EDMBlock, ResBlock

from .family import Context, Found, checkpoint_attributes, random_tensor, unfused_class

_MIXINS: dict[type[nn.Module], type[ResBlock] | type[EDMBlock]] = {
    reference.ResBlock: ResBlock,
    reference.EDMBlock: EDMBlock,
}


def recognise(module: nn.Module, context: Context) -> Found | None:
    if not isinstance(module, reference.ResBlock | reference.EDMBlock):
        return None
    name = type(module).__name__
    mixin = _MIXINS.get(unfused_class(module))
    if isinstance(module, ResBlock | EDMBlock):
        mixin = type(module)
    if mixin is None:
        why = f"{name} is a subclass that may compute otherwise"
        return Found(None, why, parts=_parts(module))
    if (altered := alteration(module)) is not None:
        return Found(None, f"{name} is not as built: {altered}", parts=_parts(module))
    if isinstance(module, ResBlock | EDMBlock):
        mode = context.mode(module.checkpoint)
    else:
        mode = context.mode("full" if module.use_checkpoint else "none")
    what = f"{name}, checkpoint {mode}"
    if mode == "selective" and (kept := called(module)):
        what += f", which keeps the input of {' and '.join(kept)}"
    return Found(mixin, what, _parts(module), checkpoint_attributes(mode), _inputs)


def _parts(block: nn.Module) -> list[nn.Module]:
    """What a block of this class computes by itself, or would if it were as built."""
    if isinstance(block, reference.ResBlock):
        return [*block.in_layers.modules(), *block.out_layers.modules()]
    return [block.norm0, block.norm1]  # type: ignore[list-item]


def _inputs(block: Any) -> tuple[Tensor, Tensor]:
    if isinstance(block, reference.ResBlock):
        channels, size = block.channels, (8,) * block.dims
    else:
        channels, size = block.in_channels, (8, 8)
    return random_tensor(2, channels, *size), random_tensor(2, block.emb_channels)
