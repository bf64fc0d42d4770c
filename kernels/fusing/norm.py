"""Group norms: which ones the operator computes, and those of which nobody can know what follows.

Beside PyTorch's own and this project's those are OpenAI's `GroupNorm32` and EDM's `GroupNorm`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resblock_bench.kernels.alterations import NORMS, is_untouched
from resblock_bench.kernels.modules import GroupNormSiLU, normalise

from .family import Context, Found, is_fused, random_like, unfused_class
from .trial import norm_trial, public_attributes, silu_trial

_ATTRIBUTES = {"num_groups", "num_channels", "eps", "affine"}
_PARAMETERS = {"weight", "bias"}
SILUS = ("SiLU", "Swish")
"""What such classes are called."""


class FusedNorm:
    """Mixin of a group norm that is no `nn.GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self, x)  # type: ignore[arg-type]


def recognise(module: nn.Module, context: Context) -> Found | None:
    if isinstance(module, torch.jit.ScriptModule):
        if "Norm" in module.original_name:
            return Found(None, f"{module.original_name} is compiled by TorchScript")
        return None
    if isinstance(module, GroupNormSiLU) and not is_fused(module):
        return None
    if not _is_called_norm(module):
        return None
    if "forward" in vars(module):
        return Found(None, f"{type(module).__name__} has a forward of its own")
    if (why := no_norm(module)) is not None:
        return Found(None, why)
    if isinstance(module, nn.GroupNorm):
        what = "GroupNormSiLU without activation"
        return Found(GroupNormSiLU, what, attributes={"activation": None}, inputs=_inputs)
    return Found(FusedNorm, f"{type(module).__name__} without activation", inputs=_inputs)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a group norm that the operator computes, and nothing else happens in it."""
    return is_untouched(module) and no_norm(module) is None


def is_silu(module: nn.Module) -> bool:
    """Whether it is a SiLU, of whatever class, and nothing else happens in it."""
    cls = type(module)
    if not is_untouched(module):
        return False
    return cls is nn.SiLU or (
        cls.__name__ in SILUS
        and not any(True for _ in module.children())
        and not any(True for _ in module.parameters())
        and not public_attributes(module)
        and silu_trial(cls) is None
    )


def no_norm(module: nn.Module) -> str | None:
    """Why the operator does not compute a module's norm; None where it does."""
    cls = unfused_class(module)
    if cls in NORMS:
        return None
    if not _is_called_norm(module):
        return f"{cls.__name__} is no group norm"
    if issubclass(cls, nn.GroupNorm) and cls.__name__ != "GroupNorm32":
        return f"{cls.__name__} is a subclass"
    more = public_attributes(module) - _ATTRIBUTES
    parameters = {name for name, _ in module.named_parameters()}
    if more or not parameters <= _PARAMETERS or any(True for _ in module.buffers()):
        return f"{cls.__name__} has more than a group norm: {', '.join(sorted(more | parameters))}"
    return norm_trial(cls)


def _is_called_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) or (
        unfused_class(module).__name__ == "GroupNorm"
        and isinstance(getattr(module, "num_groups", None), int)
        and isinstance(getattr(module, "eps", None), float)
        and isinstance(getattr(module, "weight", None), Tensor)
    )


def channels_of(norm: nn.Module) -> int:
    weight = getattr(norm, "weight", None)
    return int(norm.num_channels if weight is None else len(weight))  # type: ignore[arg-type]


def _inputs(norm: nn.Module) -> tuple[Tensor]:
    return (random_like(norm.weight, 2, channels_of(norm), 8, 8),)
