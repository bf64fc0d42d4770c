"""Autocast as on CUDA, for tensors that are on the CPU.

A step that is planned runs on the CPU's fake tensors, and under autocast the CPU computes in 16
bits what CUDA computes in float32, and returns in float32 (AT_FORALL_FP32 in ATen/autocast_mode.h):
the activations behind a norm are twice as large there. These are the functions that U-Nets call
with tensors of 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_IN_FLOAT32 = {
    F.group_norm,
    F.layer_norm,
    F.rms_norm,
    F.interpolate,
    F.softmax,
    torch.group_norm,
    torch.layer_norm,
    torch.softmax,
    Tensor.softmax,
}
_OF_16_BITS = (torch.float16, torch.bfloat16)


class CudaAutocast(TorchFunctionMode):
    """Where autocast is on, also inside a checkpoint that is computed again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_float32(value) for value in args]
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _OF_16_BITS else value
