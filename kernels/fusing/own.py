"""The blocks of this project."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resblock_bench import reference
from resblock_bench.kernels.alterations import alteration
from resblock_bench.kernels.blocks import EDMBlock, ResBlock

from .family import (
    Context,
    Found,
    called,
    checkpoint_attributes,
    describe_block,
    parameter_of,
    random_like,
    unfused_class,
)

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
    what = describe_block(name, mode, called(_convolutions(module)))
    return Found(mixin, what, _parts(module), checkpoint_attributes(mode), _inputs)


def _parts(block: nn.Module) -> list[nn.Module]:
    """What a block of this class computes by itself, or would if it were as built."""
    if isinstance(block, reference.ResBlock):
        return [*block.in_layers.modules(), *block.out_layers.modules()]
    return [block.norm0, block.norm1]  # type: ignore[list-item]


def _convolutions(block: nn.Module) -> dict[str, nn.Module]:
    if isinstance(block, reference.ResBlock):
        return {"in_layers.2": block.in_layers[2], "out_layers.3": block.out_layers[3]}
    return {name: block.get_submodule(name) for name in ("conv0", "conv1")}


def _inputs(block: Any) -> tuple[Tensor, Tensor]:
    if isinstance(block, reference.ResBlock):
        channels, size = block.channels, (8,) * block.dims
        conv, linear = block.in_layers[2], block.emb_layers[1]
    else:
        channels, size = block.in_channels, (8, 8)
        conv, linear = block.conv0, block.affine
    return (
        random_like(parameter_of(conv), 2, channels, *size),
        random_like(parameter_of(linear), 2, block.emb_channels),
    )
