"""Fusing a model in place: its blocks and norms change class and keep their parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from resblock_bench import reference
from resblock_bench.reference import arguments

from .blocks import CheckpointMode, EDMBlock, ResBlock, check_mode
from .modules import GroupNormSiLU

_FUSED: dict[type[nn.Module], type[ResBlock] | type[EDMBlock]] = {
    reference.ResBlock: ResBlock,
    reference.EDMBlock: EDMBlock,
}
_NORMS = (nn.GroupNorm, reference.GroupNorm32)


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
    `GroupNormSiLU` without activation. Hooks of blocks and convolutions still run, but those on a
    block's inner norms and activations no longer do, nor, with "selective", its convolutions'.

    checkpoint: the mode of every block, or None to leave each as it is (`use_checkpoint` means
    "full"). Subclasses are left alone, since they may compute something else. Returns the report.
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
        if fused is not None or isinstance(module, ResBlock | EDMBlock):
            was_fused = fused is None
            if fused is not None:
                module.__class__ = fused
                module.checkpoint = "full" if module.use_checkpoint else "none"
            if checkpoint is not None:
                module.checkpoint = checkpoint
            what = f"{type(module).__name__}, checkpoint {module.checkpoint}"
            report.fused[name] = what + (" (was fused before)" if was_fused else "")
            inside.update(_own_norms(module))
        elif isinstance(module, reference.ResBlock | reference.EDMBlock):
            report.left[name] = f"{type(module).__name__} is a subclass that may compute otherwise"
            inside.update(_own_norms(module))
        elif type(module) in _NORMS and module not in inside:
            activation = "silu" if name in heads else None
            module.__class__ = GroupNormSiLU
            module.activation = activation
            report.fused[name] = "GroupNormSiLU" + ("" if activation else " without activation")
        elif isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNormSiLU):
            if module not in inside:
                report.left[name] = f"{type(module).__name__} is a subclass"
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
            if type(out[i]) in _NORMS and type(out[i + 1]) is nn.SiLU:
                out[i + 1] = nn.Identity()
                names.append(f"{prefix}.{i}")
    return names


def _own_norms(block: nn.Module) -> list[nn.Module]:
    if isinstance(block, reference.ResBlock):
        return [block.in_layers[0], block.out_layers[0]]
    return [block.norm0, block.norm1]  # type: ignore[list-item]
