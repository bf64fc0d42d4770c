"""Nearest ×2 upsampling and 2-wide average pooling between the activation and the convolution.

They are each other's adjoint up to a constant: with k = 2^(resampled dims),
upᵀ = k·pool and poolᵀ = up / k, so neither backward needs what the forward read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Direction = Literal["up", "down"]


class Resample(NamedTuple):
    """mode "up", "down" or None. Volumes are resampled in their inner two dimensions only."""

    mode: str | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.mode == "up":
            return _repeat(h)
        return _mean(h) if self.mode == "down" else h

    def backward(self, dh: Tensor, size: torch.Size) -> Tensor:
        """The gradient of what `forward` read, which had this shape."""
        if self.mode == "up":
            return _mean(dh) * float(_window(dh)[1])
        if self.mode is None:
            return dh
        dh = _repeat(dh) / float(_window(dh)[1])
        # Pooling leaves out the last row and column of an odd size.
        missing = [wanted - found for wanted, found in zip(size[2:], dh.shape[2:], strict=True)]
        # A compiler must not ask, since the answer would be one of even or of odd sizes alone.
        if torch.compiler.is_compiling() or any(missing):
            dh = F.pad(dh, [n for m in reversed(missing) for n in (0, m)])
        return dh


def _window(h: Tensor) -> tuple[tuple[int, ...], int]:
    """Factors per spatial dimension, and their product."""
    spatial = h.dim() - 2
    return ((1, 2, 2), 4) if spatial == 3 else ((2,) * spatial, 2**spatial)


def _repeat(h: Tensor) -> Tensor:
    size = [s * f for s, f in zip(h.shape[2:], _window(h)[0], strict=True)]
    return F.interpolate(h, size=size, mode="nearest")


def _mean(h: Tensor) -> Tensor:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[h.dim() - 3]
    if h.dim() < 5:
        return pool(h, _window(h)[0])
    # The CPU pools no volumes in 16 bits, and autocast would return fp32.
    compute = torch.promote_types(h.dtype, torch.float32)
    return pool(h.to(compute), _window(h)[0]).to(h.dtype)
