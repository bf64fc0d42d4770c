"""Whether a block still is what its class builds.

A fused block computes its norms, activations, dropout and resampling itself, and calls the rest:
the embedding's layers, the skip, and convolutions that are more than their parameters. Whatever
stands in the place of what it computes, or has hooks there, would be passed over in silence.
"""

from __future__ import annotations

from typing import TypeAlias, cast, get_args

from torch import nn

from resblock_bench import reference

from .op import Convolution, Kernel

ConvNd: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
# Apart, since torch.compile traces get_args in newer versions only.
CONVOLUTIONS = get_args(ConvNd)
NORMS = (nn.GroupNorm, reference.GroupNorm, reference.GroupNorm32)
# Tuples, since torch.compile traces a union of types in newer versions only.
_RESAMPLED = (reference.Upsample, reference.Downsample)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
Layers: TypeAlias = dict[str, tuple[tuple[type[nn.Module], ...] | None, ...]]
"""The classes of a block's layers by sequence and position; None is called, whatever it is."""
_LAYERS: Layers = {
    "in_layers": (NORMS, (nn.SiLU,), None),
    "out_layers": (NORMS, (nn.SiLU,), (nn.Dropout,), None),
}


def alteration(block: nn.Module) -> str | None:
    """The first thing in a ResBlock or EDMBlock that its class does not build, or None."""
    if "_forward" in block.__dict__ or "forward" in block.__dict__:
        return "it has a forward of its own"
    if isinstance(block, reference.ResBlock):
        return altered_layers(block, _LAYERS) or _resampling(block.h_upd)
    for name in ("norm0", "norm1"):
        if (found := replaced(getattr(block, name), NORMS)) is not None:
            return f"{name} {found}"
    return None


def altered_layers(block: nn.Module, expected: Layers) -> str | None:
    """The first layer in a block's sequences that is of another class than expected."""
    for name, kinds in expected.items():
        layers = getattr(block, name)
        if type(layers) is not nn.Sequential or len(layers) != len(kinds):
            return f"{name} has not the {len(kinds)} layers that the class builds"
        if not is_exactly(layers, (nn.Sequential,)):
            return f"{name} has hooks or a forward of its own"
        for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
            if kind is not None and (found := replaced(layer, kind)) is not None:
                return f"{name}.{i} {found}"
    return None


def recomputable(conv: nn.Module) -> bool:
    """Whether a convolution is its parameters alone, and of a kind that `norm_act_conv` takes."""
    return (
        is_exactly(conv, CONVOLUTIONS)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def kernel_of(conv: nn.Module) -> Kernel | None:
    """A convolution as its parameters, where it is these alone."""
    if not recomputable(conv):
        return None
    plain = cast(ConvNd, conv)
    constants = Convolution(
        plain.stride, cast("tuple[int, ...]", plain.padding), plain.dilation, plain.groups
    )
    return Kernel(plain.weight, plain.bias, constants)


def is_exactly(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether calling it is what its class says: no subclass (parametrizations make one)."""
    return type(module) in kinds and is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether nothing but its class says what calling it does."""
    return "forward" not in module.__dict__ and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def replaced(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    if is_exactly(module, kinds):
        return None
    if type(module) not in kinds:
        return f"is a {type(module).__name__} where the class builds a {kinds[-1].__name__}"
    return "has hooks or a forward of its own"


def _resampling(module: nn.Module) -> str | None:
    if not is_exactly(module, (nn.Identity, *_RESAMPLED)):
        return f"h_upd is a {type(module).__name__} that the class does not build, or has hooks"
    if isinstance(module, _RESAMPLED) and module.use_conv:
        return "h_upd has a convolution of its own"
    if isinstance(module, reference.Downsample):
        step: int | tuple[int, ...] = (1, 2, 2) if module.dims == 3 else 2
        if not is_exactly(module.op, _POOLS) or any(
            size not in (step, (step,)) for size in (module.op.kernel_size, module.op.stride)
        ):
            return f"h_upd.op is {module.op}"
    return None
