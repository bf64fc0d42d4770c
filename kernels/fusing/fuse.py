"""Fusing a model in place: its blocks and norms change class and keep their parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from resblock_bench import reference
from resblock_bench.kernels.alterations import CONVOLUTIONS
from resblock_bench.kernels.blocks import CheckpointMode, check_mode
from resblock_bench.reference import arguments

from . import diffusers, edm, norm, openai, own, sequential
from .family import Context, Family, Found, become, is_fused, restore
from .norm import SILUS
from .verify import original, wrong

FAMILIES: tuple[Family, ...] = (
    own.recognise,
    openai.recognise,
    edm.recognise,
    diffusers.recognise,
    sequential.recognise,
    norm.recognise,
)
"""The first one that knows a module decides."""

# Models of this project that run their head as a whole.
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


def fuse_(
    model: nn.Module, checkpoint: CheckpointMode | None = None, *, verify: bool = False
) -> FuseReport:
    """Fuse the residual blocks and group norms of a model, in place.

    Modules change class and stay the same objects: parameters are shared with every optimizer that
    holds them, state-dict keys remain, and each is still an instance of its own class. Known are
    the blocks of this project, of improved-diffusion, guided-diffusion, EDM and diffusers, a group
    norm with the SiLU and the dropout behind it in an nn.Sequential, and group norms alone.

    What would compute something else is left alone: blocks whose norm, activation, dropout or
    resampling was replaced or has hooks, and classes whose forward is another. With "selective" a
    convolution that is more than its parameters is called and keeps its input; the report names it.
    Of blocks of other classes the group norms alone are fused, and the report lists them as left.

    checkpoint: the mode of every block, or None to leave each as it is (`use_checkpoint` means
    "full"). verify: hold every module that is fused, with dropout off, against a float64 copy of
    what it was, on random input, output and gradients; what is wrong is left alone. Returns the
    report; warns where nothing is fused. `unfuse_` undoes it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_: model must be an nn.Module, got {arguments.received(model)}")
    if checkpoint is not None:
        check_mode(checkpoint)
    arguments.flags("fuse_", verify=verify)
    if verify and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "fuse_: verify=True needs real weights, and some of the model's are on the meta device;"
            " load them first, or fuse without verify."
        )
    report = FuseReport()
    context = Context(model, checkpoint)
    parts: set[nn.Module] = set()  # of what is known already, fused or left
    for name, module in model.named_modules():
        if module in parts:
            continue
        found = _recognise(module, context)
        if found is None:
            continue
        parts.update(found.parts)
        if found.mixin is None:
            report.left[name] = found.what
            continue
        before = isinstance(module, found.mixin)
        hold = verify and found.held and (is_fused(module) or not before)
        was = original(module) if hold else None
        become(module, found.mixin, found.attributes)
        if was is not None and (why := wrong(module, was, found)) is not None:
            restore(module)
            report.left[name] = f"{found.what}: {why}"
        else:
            report.fused[name] = found.what + (" (was fused before)" if before else "")
    for name, module in model.named_modules():
        known = name in report.fused or name in report.left or module in parts
        if not known and _could_fuse_more(module, root=module is model):
            own_head = type(module) in _WITH_HEAD
            why = "has another head than is built" if own_head else "is of no class that is known"
            report.left[name] = (
                f"{type(module).__name__} {why}: of its own layers the group norms alone are fused"
            )
    if not report.fused:
        warnings.warn(f"fuse_ changed nothing: {report}", stacklevel=2)
    return report


def _recognise(module: nn.Module, context: Context) -> Found | None:
    return next((found for f in FAMILIES if (found := f(module, context)) is not None), None)


def _could_fuse_more(module: nn.Module, *, root: bool) -> bool:
    """Whether a reader would expect more of a module of an unknown class than its norms.

    That is of layers like a residual block's or an output head's: a group norm beside a SiLU, or,
    since activations may be functions, beside a convolution that is larger than 1 and no activation
    of another kind. Layers in a container are those of the module around it, unless it is fused.
    """
    if type(module) is reference.EDMUNet or (isinstance(module, _CONTAINERS) and not root):
        return False
    layers = list(_layers(module))
    if not any(
        isinstance(layer, nn.GroupNorm) and not getattr(layer, "activation", None)
        for layer in layers
    ):
        return False
    if any(isinstance(layer, nn.SiLU) or type(layer).__name__ in SILUS for layer in layers):
        return True
    return not any(type(layer).__module__ == nn.SiLU.__module__ for layer in layers) and any(
        isinstance(layer, CONVOLUTIONS) and max(layer.kernel_size) > 1 for layer in layers
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            if not is_fused(child):
                yield from _layers(child)
        else:
            yield child
