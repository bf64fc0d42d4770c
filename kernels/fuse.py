"""Fusing a model in place: its blocks and norms change class and keep their parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from resblock_bench import reference
from resblock_bench.reference import arguments

from .alterations import NORMS, alteration, called, is_exactly
from .blocks import CheckpointMode, EDMBlock, ResBlock, check_mode
from .modules import GroupNormSiLU

_FUSED: dict[type[nn.Module], type[ResBlock] | type[EDMBlock]] = {
    reference.ResBlock: ResBlock,
    reference.EDMBlock: EDMBlock,
}


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
    than its parameters is called and keeps its input; the report names it.

    checkpoint: the mode of every block, or None to leave each as it is (`use_checkpoint` means
    "full"). Returns the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model must be an nn.Module, got {arguments.received(model)}")
    if checkpoint is not None:
        check_mode(checkpoint)
    report = FuseReport()
    inside: set[nn.Module] = set()  # norms whose block reads their parameters itself
    heads: set[str] = set()  # norms of output heads, which take their SiLU in
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
                activation = "silu" if name in heads else None
                module.__class__ = GroupNormSiLU
                module.activation = activation  # type: ignore[assignment]
                report.fused[name] = "GroupNormSiLU" + ("" if activation else " without activation")
        elif isinstance(module, reference.UNetModel | reference.EncoderUNetModel):
            heads.update(_take_in_activation(module.out, f"{name}.out" if name else "out"))
    return report


def _take_in_activation(out: nn.Module, prefix: str) -> list[str]:
    """Remove the SiLU behind a norm of an output head; returns the names of such norms.

    In this project's models alone, which run their heads as they stand: elsewhere a model may
    index into its Sequential and use the norm without its activation.
    """
    names = []
    if isinstance(out, nn.Sequential):
        for i in range(len(out) - 1):
            if is_exactly(out[i], NORMS) and is_exactly(out[i + 1], (nn.SiLU,)):
                out[i + 1] = nn.Identity()
                names.append(f"{prefix}.{i}")
    return names


def _own_norms(block: nn.Module) -> list[nn.Module]:
    """Those that a block of this class computes, or would if it were as built."""
    if isinstance(block, reference.ResBlock):
        return [*block.in_layers.modules(), *block.out_layers.modules()]
    return [block.norm0, block.norm1]  # type: ignore[list-item]
