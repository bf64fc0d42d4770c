"""Fusing a model in place: its blocks and norms change class and keep their parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from resblock_bench import reference
from resblock_bench.kernels.blocks import CheckpointMode, EDMBlock, ResBlock, check_mode
from resblock_bench.kernels.modules import GroupNormSiLU

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
    holds them, hooks and state-dict keys remain. `ResBlock` and `EDMBlock` become their fused
    forms; a group norm directly followed by a SiLU in a Sequential takes the SiLU in; the other
    group norms (of attention) become `GroupNormSiLU` without activation.

    checkpoint: the mode of every block, or None to leave each as it is (`use_checkpoint` means
    "full"). Subclasses are left alone, since they may compute something else. Returns the report.
    """
    if checkpoint is not None:
        check_mode(checkpoint)
    report = FuseReport()
    inside: set[nn.Module] = set()  # norms whose block reads their parameters itself
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
        elif isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                norm, activation = module[i], module[i + 1]
                if type(norm) in _NORMS and type(activation) is nn.SiLU and norm not in inside:
                    _swap_norm(norm, "silu")
                    module[i + 1] = nn.Identity()
                    report.fused[f"{name}.{i}" if name else f"{i}"] = "GroupNormSiLU"
        elif type(module) in _NORMS and module not in inside:
            _swap_norm(module, None)
            report.fused[name] = "GroupNormSiLU without activation"
    return report


def _swap_norm(norm: nn.Module, activation: str | None) -> None:
    norm.__class__ = GroupNormSiLU
    norm.activation = activation  # type: ignore[assignment]


def _own_norms(block: nn.Module) -> list[nn.Module]:
    if isinstance(block, reference.ResBlock):
        return [block.in_layers[0], block.out_layers[0]]
    return [block.norm0, block.norm1]  # type: ignore[list-item]
