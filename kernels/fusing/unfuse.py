"""Undoing `fuse_`."""

from __future__ import annotations

from torch import nn

from resblock_bench.reference import arguments

from .family import is_fused, restore


def unfuse_(model: nn.Module) -> list[str]:
    """Give back, in place, the model that it was before `fuse_`: its classes and attributes.

    Parameters are what they have become since. Blocks that were built fused stay so. Returns the
    names of the modules that were given back.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse_: model must be an nn.Module, got {arguments.received(model)}")
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for _, module in fused:
        restore(module)
    return [name for name, _ in fused]
