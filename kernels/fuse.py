"""Fusing a model in place: its blocks and norms change class and keep their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from resblock_bench import reference
from resblock_bench.reference import arguments

from .alterations import CONVOLUTIONS, NORMS, alteration, called, is_exactly
from .blocks import CheckpointMode, EDMBlock, ResBlock, check_mode
from .modules import GroupNormSiLU

_FUSED: dict[type[nn.Module], type[ResBlock] | type[EDMBlock]] = {
    reference.ResBlock: ResBlock,
    reference.EDMBlock: EDMBlock,
}
# Models that run their head, a Sequential named `out`, as a whole.
_WITH_HEAD = (reference.UNetModel, reference.SuperResModel, reference.EncoderUNetModel)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class FuseReport:
    """What `fuse_` did: module name → what it became, and module name → why it was left alone."""

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "nothing to fuse: the model has no residual block and no group norm"
        lines = [f"fused {len(self.fused)}, left {len(self.left)}"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.fused.items()]
        lines += [f"  {name or '(model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def fuse_(model: nn.Module, checkpoint: CheckpointMode | None = None) -> FuseReport:
    """Replace the residual blocks and group norms of a model of this project, in place.

    Modules change class and stay the same objects: parameters are shared with every optimizer that
    holds them, and state-dict keys remain. `ResBlock` and `EDMBlock` become their fused forms; the
    norm of an output head takes in the SiLU behind it; the other group norms (of attention) become
    `GroupNormSiLU` without activation.

    What would compute something else is left alone: subclasses, and blocks whose norm, activation,
    dropout or resampling was replaced or has hooks. With "selective" a convolution that is more
    than its parameters is called and keeps its input; the report names it. Of blocks and heads of
    other classes the group norms alone are fused, and the report lists them as left, too.

    checkpoint: the mode of every block, or None to leave each as it is (`use_checkpoint` means
    "full"). Returns the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model must be an nn.Module, got {arguments.received(model)}")
    if checkpoint is not None:
        check_mode(checkpoint)
    report = FuseReport()
    inside: set[nn.Module] = set()  # norms whose block reads their parameters itself
    heads: set[nn.Module] = set()  # norms of output heads, which take their SiLU in
    shared = _shared(model)
    for name, module in model.named_modules():
        fused = _FUSED.get(type(module))
        if (fused is not None or type(module) in _FUSED.values()) and (
            altered := alteration(module)
        ) is not None:
            report.left[name] = f"{type(module).__name__} is not as built: {altered}"
            inside.update(_own_norms(module))
        elif fused is not None or isinstance(module, ResBlock | EDMBlock):
            was_fused = fused is None
            if fused is not None:
                module.__class__ = fused
                module.checkpoint = "full" if module.use_checkpoint else "none"
            if checkpoint is not None:
                module.checkpoint = checkpoint
            what = f"{type(module).__name__}, checkpoint {module.checkpoint}"
            if module.checkpoint == "selective" and (kept := called(module)):
                what += f", which keeps the input of {' and '.join(kept)}"
            report.fused[name] = what + (" (was fused before)" if was_fused else "")
            inside.update(_own_norms(module))
        elif isinstance(module, reference.ResBlock | reference.EDMBlock):
            report.left[name] = f"{type(module).__name__} is a subclass that may compute otherwise"
            inside.update(_own_norms(module))
        elif isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNormSiLU):
            if module in inside:
                continue
            if type(module) not in NORMS:
                report.left[name] = f"{type(module).__name__} is a subclass"
            elif "forward" in module.__dict__:
                report.left[name] = f"{type(module).__name__} has a forward of its own"
            else:
                activation = "silu" if module in heads else None
                module.__class__ = GroupNormSiLU
                module.activation = activation  # type: ignore[assignment]
                report.fused[name] = "GroupNormSiLU" + ("" if activation else " without activation")
        elif type(module) in _WITH_HEAD and (norms := _take_in_activation(module, shared)):
            heads.update(norms)
        elif _could_fuse_more(module, root=module is model):
            own_head = type(module) in _WITH_HEAD
            why = "has another head than is built" if own_head else "is of no class that is known"
            report.left[name] = (
                f"{type(module).__name__} {why}: of its own layers the group norms alone are fused"
            )
        elif isinstance(module, torch.jit.ScriptModule) and "Norm" in module.original_name:
            report.left[name] = f"{module.original_name} is compiled by TorchScript"
    return report


def _take_in_activation(model: nn.Module, shared: set[nn.Module]) -> list[nn.Module]:
    """Remove the SiLU behind a norm of the output head; returns such norms.

    In this project's own models alone, which run their heads as they stand: others, subclasses too,
    may index into their Sequential and use the norm without its activation.
    """
    norms = []
    out: Any = model.out
    if "forward" not in model.__dict__ and is_exactly(out, (nn.Sequential,)):
        for i in range(len(out) - 1):
            norm, activation = out[i], out[i + 1]
            head = is_exactly(norm, NORMS) and is_exactly(activation, (nn.SiLU,))
            if head and norm not in shared:
                out[i + 1] = nn.Identity().train(activation.training)
                norms.append(norm)
    return norms


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that stand in more than one place."""
    found: set[nn.Module] = set()
    shared: set[nn.Module] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        (shared if module in found else found).add(module)
    return shared


def _could_fuse_more(module: nn.Module, *, root: bool) -> bool:
    """Whether a reader would expect more of a module of an unknown class than its norms.

    That is of layers like a residual block's or an output head's: a group norm beside a SiLU, or,
    since activations may be functions, beside a convolution that is larger than 1 and no activation
    of another kind. Layers in a container are those of the module around it.
    """
    if type(module) is reference.EDMUNet or (isinstance(module, _CONTAINERS) and not root):
        return False
    layers = list(_layers(module))
    if not any(
        isinstance(layer, nn.GroupNorm) and not getattr(layer, "activation", None)
        for layer in layers
    ):
        return False
    if any(isinstance(layer, nn.SiLU) for layer in layers):
        return True
    return not any(type(layer).__module__ == nn.SiLU.__module__ for layer in layers) and any(
        isinstance(layer, CONVOLUTIONS) and max(layer.kernel_size) > 1 for layer in layers
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _layers(child)
        else:
            yield child


def _own_norms(block: nn.Module) -> list[nn.Module]:
    """Those that a block of this class computes, or would if it were as built."""
    if isinstance(block, reference.ResBlock):
        return [*block.in_layers.modules(), *block.out_layers.modules()]
    return [block.norm0, block.norm1]  # type: ignore[list-item]
