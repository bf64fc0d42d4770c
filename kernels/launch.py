"""Launches of the Triton kernels: plain tensors in and out, every allocation made here.

A `Forward`, `Rewrite`, `Backward` or `Residual` is made for tensors of given shapes, strides and
dtypes on one device, and then called with any such tensors: making it takes several times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backward import backward_kernel
from .forward import forward_kernel
from .launcher import Launcher
from .launcher import Recorded as Recorded
from .launcher import recording as recording
from .residual import residual_kernel
from .spec import Gradients, Modulation, Spec, memory_format
from .tiers import (
    STREAM_ELEMENTS,
    THREAD_ELEMENTS,
    Launch,
    ceil_div,
    power_of_2,
    warps_for,
)
from .words import words

# Of partial sums, what a warp folds at once: four to a thread.
FOLD_ELEMENTS = 128

Rows = Sequence[Tensor | None]
"""The five tensors of a `Modulation`."""

_SMALL = ("p_seed", "p_weight", "p_bias", "p_scale", "p_shift", "p_pre")
_GRADIENTS = ("p_dweight", "p_dbias", "p_dscale", "p_dshift", "p_dpre")


class Forward:
    """y = dropout(act(norm(x + pre_shift)·γ' + β')), and every group's mean and rstd (N, G)."""

    def __init__(self, x: Tensor, modulation: Modulation, spec: Spec, launch: Launch) -> None:
        N, C = x.shape[:2]
        units = N * ceil_div(C, launch.slab)
        self._out_dtype, self._device = spec.out_dtype, x.device
        self._statistics = (N, spec.num_groups)
        self._words = 1 + units if launch.split else 0
        parts = _group_parts(x, units, launch, spec) if launch.split else 0
        self._launch = Launcher(
            forward_kernel,
            launch.programs(units),
            ("p_x", "p_y", "p_mean", "p_rstd", *_SMALL, "p_words"),
            {
                "eps": spec.eps,
                **_row_strides(modulation),
                **_shape(launch.phase, launch, x, spec),
                **_forward_registers(launch, x),
            },
            {"p_partial_mean": parts, "p_partial_m2": parts},
        )

    def __call__(
        self, x: Tensor, modulation: Rows, seed: Tensor | None, *, own_words: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """own_words: as in `words`."""
        y = torch.empty_like(x, dtype=self._out_dtype)
        mean = torch.empty(self._statistics, dtype=torch.float32, device=self._device)
        rstd = torch.empty_like(mean)
        counters = words(self._device, self._words, own=own_words) if self._words else None
        self._launch(x, y, mean, rstd, seed, *modulation, counters)
        return y, mean, rstd


class Rewrite:
    """The forward's output once more, from the saved statistics: one read, one write."""

    def __init__(self, x: Tensor, modulation: Modulation, spec: Spec, launch: Launch) -> None:
        N, C = x.shape[:2]
        self._out_dtype = spec.out_dtype
        self._launch = Launcher(
            forward_kernel,
            N * ceil_div(C, launch.slab) * launch.parts,
            ("p_x", "p_y", "p_mean", "p_rstd", *_SMALL),
            {
                "p_partial_mean": None,
                "p_partial_m2": None,
                "p_words": None,
                "eps": spec.eps,
                **_row_strides(modulation),
                **_shape("rewrite", launch, x, spec),
            },
        )

    def __call__(
        self, x: Tensor, mean: Tensor, rstd: Tensor, modulation: Rows, seed: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x, dtype=self._out_dtype)
        self._launch(x, y, mean, rstd, seed, *modulation)
        return y


class Backward:
    """dx and the gradients of the five modulation tensors. dy has the layout of x."""

    def __init__(self, x: Tensor, modulation: Modulation, spec: Spec, launch: Launch) -> None:
        N, C = x.shape[:2]
        slabs = ceil_div(C, launch.slab)
        units = N * slabs
        summed = modulation.weight is not None or modulation.bias is not None
        self._device = x.device
        self._words = 1 + slabs + units if launch.split or summed else 0
        sums = N * C if summed else 0
        groups = N * spec.num_groups if launch.split else 0
        partials = N * launch.splits * C if launch.split else 0
        parts = _group_parts(x, units, launch, spec) if launch.split else 0
        self._launch = Launcher(
            backward_kernel,
            launch.programs(units),
            ("p_dy", "p_x", "p_dx", "p_mean", "p_rstd", *_SMALL, *_GRADIENTS, "p_words"),
            {
                "N": N,
                "BLOCK_SLAB": power_of_2(launch.slab),
                "BLOCK_N": max(1, FOLD_ELEMENTS * launch.num_warps // power_of_2(launch.slab)),
                **_row_strides(modulation),
                **_shape(launch.phase, launch, x, spec),
                **_registers(launch, x, spec),
            },
            {
                "p_s1": sums,
                "p_s2": sums,
                "p_c1": groups,
                "p_c2": groups,
                "p_partial_s1": partials,
                "p_partial_s2": partials,
                "p_partial_s3": partials if modulation.pre_shift is not None else 0,
                "p_group_s1": parts,
                "p_group_s2": parts,
            },
        )

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        modulation: Rows,
        seed: Tensor | None,
        *,
        own_words: bool = False,
    ) -> tuple[Tensor, Gradients]:
        """own_words: as in `words`."""
        dx = torch.empty_like(x)
        gradients = tuple(
            [
                None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
                for t in modulation
            ]
        )
        counters = words(self._device, self._words, own=own_words) if self._words else None
        self._launch(dy, x, dx, mean, rstd, seed, *modulation, *gradients, counters)
        return dx, gradients


class Residual:
    """(skip + h + bias)·scale, in the wider of the two dtypes; skip has the layout of h."""

    def __init__(self, skip: Tensor, h: Tensor, scale: float) -> None:
        self._dtype = torch.promote_types(skip.dtype, h.dtype)
        C = h.shape[1]
        channels_last = memory_format(h) != torch.contiguous_format
        columns = C if channels_last else h[0, 0].numel()
        rows = h.numel() // columns
        block_hw = min(power_of_2(columns), STREAM_ELEMENTS)
        block_r = min(power_of_2(rows), STREAM_ELEMENTS // block_hw)
        self._launch = Launcher(
            residual_kernel,
            ceil_div(rows, block_r) * ceil_div(columns, block_hw),
            ("p_skip", "p_h", "p_bias", "p_y"),
            {
                "rows": rows,
                "columns": columns,
                "C": C,
                "scale": scale,
                "CHANNELS_LAST": channels_last,
                "BLOCK_R": block_r,
                "BLOCK_HW": block_hw,
                "num_warps": warps_for(block_r * block_hw, THREAD_ELEMENTS["forward"]),
            },
        )

    def __call__(self, skip: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty_like(h, dtype=self._dtype)
        self._launch(skip, h, bias, y)
        return y


def forward(
    x: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    launch: Launch,
    *,
    own_words: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of a `Forward`."""
    return Forward(x, modulation, spec, launch)(x, modulation, seed, own_words=own_words)


def rewrite(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    launch: Launch,
) -> Tensor:
    """One call of a `Rewrite`."""
    return Rewrite(x, modulation, spec, launch)(x, mean, rstd, modulation, seed)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    launch: Launch,
    *,
    own_words: bool = False,
) -> tuple[Tensor, Gradients]:
    """One call of a `Backward`."""
    prepared = Backward(x, modulation, spec, launch)
    return prepared(dy, x, mean, rstd, modulation, seed, own_words=own_words)


def residual(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """One call of a `Residual`."""
    return Residual(skip, h, scale)(skip, h, bias)


def _group_parts(x: Tensor, units: int, launch: Launch, spec: Spec) -> int:
    """What every part comes to, for each group of its unit."""
    groups = launch.slab // (x.shape[1] // spec.num_groups)
    return units * groups * launch.parts


def _row_strides(modulation: Modulation) -> Mapping[str, int]:
    rows = {
        "scale_n": modulation.scale,
        "shift_n": modulation.shift,
        "pre_n": modulation.pre_shift,
    }
    return {name: 0 if t is None else t.stride(0) for name, t in rows.items()}


def _shape(phase: str, launch: Launch, x: Tensor, spec: Spec) -> dict[str, Any]:
    C, HW = x.shape[1], x[0, 0].numel()
    CG = C // spec.num_groups
    block_g = power_of_2(launch.slab // CG)
    return {
        "PHASE": phase,
        "C": C,
        "HW": HW,
        "CG": CG,
        "splits": launch.splits,
        "tiles": launch.tiles,
        "lag": launch.lag,
        "SLAB": launch.slab,
        "BLOCK_C": launch.block_c,
        "BLOCK_HW": launch.block_hw,
        "BLOCK_S": max(1, FOLD_ELEMENTS * launch.num_warps // block_g),
        "BLOCK_G": block_g,
        "CHANNELS_LAST": memory_format(x) != torch.contiguous_format,
        "EVEN": HW % launch.block_hw == 0,
        "FULL": launch.slab % launch.block_c == 0 and C % launch.slab == 0,
        "ACTIVATION": spec.activation,
        "dropout_p": spec.dropout_p,
        "STAGES": _stages(phase, launch, x),
        "num_warps": launch.num_warps,
    }


def _stages(phase: str, launch: Launch, x: Tensor) -> int:
    """Tiles of a loop that are on their way to shared memory at once, and one; 1: none.

    Measured on an H100. In channels-last, with 5 at 16 bits, the backward took 6 to 19 % less time
    than with one tile ahead in registers. In NCHW what is divided took 3 to 5 % more than with 1.
    """
    if phase == "whole":
        return 3
    if memory_format(x) == torch.contiguous_format or not launch.split:
        return 1
    return 5 if x.element_size() == 2 else 3


def _registers(launch: Launch, x: Tensor, spec: Spec) -> dict[str, int]:
    """Of a divided backward, so few that four programs run on a multiprocessor at once.

    Left alone, ptxas takes more, or spills a few bytes to fit one program more.
    """
    if not launch.split:
        return {}
    lean = memory_format(x) == torch.contiguous_format and spec.dropout_p == 0
    return {"maxnreg": 64 if lean else 128}


def _forward_registers(launch: Launch, x: Tensor) -> dict[str, int]:
    """Of a divided forward in fp32 and channels-last, where ptxas would spill to fit one more."""
    channels_last = memory_format(x) != torch.contiguous_format
    return {"maxnreg": 96} if launch.split and channels_last and x.element_size() == 4 else {}
