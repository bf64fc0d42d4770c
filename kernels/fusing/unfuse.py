"""Undoing `fuse_`."""

from __future__ import annotations

from torch import nn

from resblock_bench.reference import arguments

from .family import is_fused, restore


def unfuse_(model: nn.Module) -> list[str]:
    """Give back, in place, the model that it was before `fuse_`: its classes and attributes.

    Parameters are what they have become since. Blocks that were built fused stay so. Returns the
    names of the modules that were given back. Raises ValueError, and undoes nothing, where a fused
    module has got a forward of its own since: that may call the fused one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse_: model must be an nn.Module, got {arguments.received(model)}")
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for name, module in fused:
        if "forward" in vars(module):
            raise ValueError(
                f"unfuse_: {name or 'the model'} ({type(module).__name__}) has got a forward of "
                "its own since it was fused, as accelerate's hooks set one, and that may call the "
                "fused one. Remove it first."
            )
    for _, module in fused:
        restore(module)
    return [name for name, _ in fused]
