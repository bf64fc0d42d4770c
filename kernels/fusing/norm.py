"""A group norm alone, of which nobody can know what follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resblock_bench.kernels.alterations import NORMS
from resblock_bench.kernels.modules import GroupNormSiLU

from .family import Context, Found, is_fused, random_tensor, unfused_class


def recognise(module: nn.Module, context: Context) -> Found | None:
    if isinstance(module, torch.jit.ScriptModule):
        if "Norm" in module.original_name:
            return Found(None, f"{module.original_name} is compiled by TorchScript")
        return None
    if isinstance(module, GroupNormSiLU) and not is_fused(module):
        return None
    if not isinstance(module, nn.GroupNorm):
        return None
    cls = unfused_class(module)
    if cls not in NORMS:
        return Found(None, f"{cls.__name__} is a subclass")
    if "forward" in vars(module):
        return Found(None, f"{cls.__name__} has a forward of its own")
    return Found(
        GroupNormSiLU,
        "GroupNormSiLU without activation",
        attributes={"activation": None},
        inputs=_inputs,
    )


def _inputs(norm: Any) -> tuple[Tensor]:
    return (random_tensor(2, norm.num_channels, 8, 8),)
