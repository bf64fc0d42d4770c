"""What a family of classes is, and how a module becomes fused.

A family is a function: `recognise(module, context) -> Found | None`. None says that the module is
none of its own; a `Found` says what it becomes, or why it is left.

A fused module is the same object with another class: a subclass of its own class, made once, in
which a mixin's methods come first. So it is an instance of whatever it was an instance of, and its
parameters, hooks, names and whoever refers to it stay. What fusing changes beside the class is a
few attributes, which are noted on the module; `restore` undoes both. Copies and pickles of it are
made by its own class's methods and become fused again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from resblock_bench.kernels.alterations import recomputable
from resblock_bench.kernels.blocks import CheckpointMode

EVERYTHING_DROPPED = "its dropout is 1, and the operator has none of everything"

_NOTE = "_before_fusing"


@dataclass(frozen=True)
class Context:
    """What a family may want to know beside the module: the model around it, and the wish."""

    model: nn.Module
    checkpoint: CheckpointMode | None

    def mode(self, usual: CheckpointMode) -> CheckpointMode:
        """The checkpoint mode of a block that has this one unless another is asked for."""
        return usual if self.checkpoint is None else self.checkpoint

    @functools.cached_property
    def owners(self) -> dict[nn.Module, list[nn.Module]]:
        """Of every module in the model those whose child it is, once for each place."""
        found: dict[nn.Module, list[nn.Module]] = {}
        for owner in self.model.modules():
            for child in owner._modules.values():
                if child is not None:
                    found.setdefault(child, []).append(owner)
        return found


@dataclass(frozen=True)
class Found:
    """What a family says of a module that it knows.

    mixin       the class whose methods it gets, or None where it is left alone
    what        what it becomes, for the report; or why it is left
    parts       modules inside that it computes by itself (or would): nobody else fuses them
    attributes  are set on it
    inputs      draws inputs of the module for `verify`
    held        whether `verify` holds it; False where it only lets a norm that is fused by itself
                take in the activation behind it
    """

    mixin: type | None
    what: str
    parts: Collection[nn.Module] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module], tuple[Any, ...]] | None = None
    held: bool = True


Family: TypeAlias = Callable[[nn.Module, Context], "Found | None"]


def checkpoint_attributes(mode: CheckpointMode) -> dict[str, Any]:
    """What a `FusedBlock` keeps its checkpoint mode in."""
    return {"use_checkpoint": mode == "full", "_selective": mode == "selective"}


def describe_block(name: str, mode: CheckpointMode, kept: Sequence[str]) -> str:
    """What a block becomes, for the report; `kept` are the convolutions that are called, and so
    keep their input in selective mode."""
    what = f"{name}, checkpoint {mode}"
    if mode == "selective" and kept:
        what += f", which keeps the input of {' and '.join(kept)}"
    return what


def called(convolutions: Mapping[str, nn.Module]) -> list[str]:
    """Those that are more than their parameters."""
    return [named(name, conv) for name, conv in convolutions.items() if not recomputable(conv)]


def named(name: str, conv: nn.Module) -> str:
    return f"{name} ({type(conv).__name__})"


def become(module: nn.Module, mixin: type, attributes: Mapping[str, Any]) -> None:
    """Give the module the mixin's methods and set attributes, in place.

    What it was is noted on it the first time.
    """
    own = vars(module)
    if _NOTE not in own:
        kept = {name: own[name] for name in attributes if name in own}
        # A class that was made says itself what was there before, also in a copy that brings its
        # own classes along.
        made = not issubclass(mixin, type(module))
        classes = None if made else (type(module), fused_class(mixin, type(module)))
        own[_NOTE] = (classes, tuple(attributes), kept)
    own.update(attributes)
    module.__class__ = fused_class(mixin, type(module))


def is_fused(module: nn.Module) -> bool:
    """Whether `become` has made it what it is."""
    return _NOTE in vars(module)


def set_by_fusing(module: nn.Module) -> set[str]:
    """The attributes that it had not before."""
    _, names, kept = vars(module).get(_NOTE, (None, (), {}))
    return set(names) - set(kept)


def unfused_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before it was fused; its class where it was not."""
    return _classes(module)[0]


def _classes(module: nn.Module) -> tuple[type[nn.Module], type[nn.Module]]:
    """The module's class before it was fused, and the one that it got; its own twice where it was
    not."""
    made: Any = _made_class(module)
    if made is not None:
        return made._unfused, made
    note = vars(module).get(_NOTE)
    pair: tuple[type[nn.Module], type[nn.Module]] | None = None if note is None else note[0]
    return (type(module), type(module)) if pair is None else pair


def _made_class(module: nn.Module) -> type | None:
    """Its class that fusing made; it has a subclass of that where others made one since."""
    return next((cls for cls in type(module).__mro__ if "_unfused" in vars(cls)), None)


def restore(module: nn.Module) -> None:
    """Undo `become`."""
    before, fused = _classes(module)
    _, names, kept = vars(module).pop(_NOTE)
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(kept)
    module.__class__ = _rebased(type(module), fused, before)


def _rebased(cls: Any, fused: type, before: type) -> Any:
    """The class with `before` in the place of `fused`.

    A parametrization and FSDP2's `fully_shard` give a module a subclass of its own.
    """
    if cls is fused:
        return before
    if not issubclass(cls, fused):
        return cls
    bases = tuple(_rebased(base, fused, before) for base in cls.__bases__)
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, body)


def fused_class(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    """The class `cls` with the mixin's methods; the mixin itself where it is a subclass already.

    Its name is theirs: some code asks for a block by its name.
    """
    if issubclass(cls, mixin):
        return cls
    if issubclass(mixin, cls):
        return mixin
    pair: Any = (mixin, cls)
    made: type[nn.Module] = _made(*pair)
    return made


@functools.cache
def _made(mixin: Any, cls: Any) -> Any:
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_mixin": mixin,
        "_unfused": cls,
    }
    return type(cls.__name__, (mixin, cls), body)


def _reduce_ex(module: Any, protocol: Any) -> Any:
    """How copy and pickle take it apart: as what it was, with the mixin's name."""
    made: Any = _made_class(module)
    build, arguments, *rest = super(made, module).__reduce_ex__(protocol)
    arguments = tuple(made._unfused if a is made else a for a in arguments)
    return _build, (made._mixin, build, arguments), *rest


def _build(mixin: type, build: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    module = build(*arguments)
    module.__class__ = fused_class(mixin, type(module))
    return module


def random_like(parameter: Any, *shape: int) -> Tensor:
    """Drawn on the CPU, in the dtype and on the device of a parameter; in fp32 without one."""
    drawn = torch.randn(shape, dtype=torch.float64, device="cpu")
    return drawn.to(parameter) if isinstance(parameter, Tensor) else drawn.float()


def parameter_of(module: nn.Module) -> Tensor | None:
    """The largest parameter in it, which says in which dtype it wants its input."""
    return max(module.parameters(), key=Tensor.numel, default=None)


def features_of(layer: nn.Module) -> int:
    """What a linear layer reads, also behind an adapter, a parametrization or a quantisation."""
    for part in layer.modules():
        if isinstance(features := getattr(part, "in_features", None), int):
            return features
    raise ValueError(f"{type(layer).__name__} does not say how many features it reads")
