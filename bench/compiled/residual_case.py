"""Kernels of this project beside the norms, for `check --static`: the addition to the skip."""

from __future__ import annotations

from typing import Any

import torch

from resblock_bench.kernels import launch as launches

from .cases import KernelCase

# The residual of a 16-bit block in both layouts, small enough to be counted.
SHAPE = (2, 64, 16, 16)


def cases() -> list[KernelCase]:
    """The residual addition, with the bias of the convolution before it."""
    return [
        _case("residual-bf16-nchw", torch.contiguous_format),
        _case("residual-bf16-nhwc", torch.channels_last),
    ]


def _case(name: str, memory_format: torch.memory_format) -> KernelCase:
    launched = _residual(memory_format, "meta")

    def arguments(device: str) -> dict[str, Any]:
        return _residual(memory_format, device).arguments

    return KernelCase(name, launched.kernel, launched.grid, arguments)


def _residual(memory_format: torch.memory_format, device: str) -> launches.Recorded:
    """The launch of one addition, which is not made."""
    skip, h = (
        torch.zeros(SHAPE, dtype=torch.bfloat16, device=device).to(memory_format=memory_format)
        for _ in range(2)
    )
    bias = torch.zeros(SHAPE[1], dtype=torch.bfloat16, device=device)
    with launches.recording() as recorded:
        launches.residual(skip, h, bias, 1.0)
    (only,) = recorded
    return only
