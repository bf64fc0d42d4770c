"""Autocast as on CUDA, for tensors that are on the CPU.

A step that is planned runs on the CPU's fake tensors, and under autocast the CPU computes in 16
bits what CUDA computes in float32, and returns in float32 (AT_FORALL_FP32 in ATen/autocast_mode.h):
the activations behind a norm are twice as large there. These are the functions that U-Nets call
with tensors of 16 bits. They are replaced, since a TorchFunctionMode does not reach what a
checkpoint computes again in the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_IN_FLOAT32 = (
    (F, "group_norm"),
    (F, "layer_norm"),
    (F, "rms_norm"),
    (F, "interpolate"),
    (F, "softmax"),
    (torch, "softmax"),
    (Tensor, "softmax"),
)
_OF_16_BITS = (torch.float16, torch.bfloat16)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within the context autocast is CUDA's, where it is on."""
    with ExitStack() as stack:
        for owner, name in _IN_FLOAT32:
            own = getattr(owner, name)
            stack.enter_context(patch.object(owner, name, _in_float32(own)))
        yield


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(map(_float32, args))
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return called


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _OF_16_BITS else value
