"""Launches of the Triton kernels: plain tensors in and out, every allocation made here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resblock_bench.kernels.backward import backward_kernel
from resblock_bench.kernels.forward import forward_kernel
from resblock_bench.kernels.residual import residual_kernel
from resblock_bench.kernels.spec import Gradients, Modulation, Spec, memory_format
from resblock_bench.kernels.tiers import (
    STREAM_ELEMENTS,
    THREAD_ELEMENTS,
    Launch,
    ceil_div,
    power_of_2,
    warps_for,
)
from resblock_bench.kernels.words import words

# Of partial sums, what a warp folds at once: four to a thread.
FOLD_ELEMENTS = 128


class Recorded(NamedTuple):
    """A launch that was not made: kernel[grid](**arguments)."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]


_recorded: list[Recorded] | None = None


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within the block no kernel runs: the list gets what would have been launched.

    With tensors on the meta device this says how a problem of any size would run.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _launch(kernel: Any, programs: int, **arguments: Any) -> None:
    if _recorded is None:
        kernel[(programs,)](**arguments)
    else:
        _recorded.append(Recorded(kernel, (programs,), arguments))


def forward(
    x: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    launch: Launch,
    *,
    own_words: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = dropout(act(norm(x + pre_shift)·γ' + β')), and every group's mean and rstd (N, G).

    own_words: as in `words`.
    """
    N, C = x.shape[:2]
    y = torch.empty_like(x, dtype=spec.out_dtype)
    mean = torch.empty((N, spec.num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    units = N * ceil_div(C, launch.slab)
    partial_mean = partial_m2 = counters = None
    if launch.split:
        partial_mean, partial_m2 = _group_parts(x, units, launch, spec)
        counters = words(x.device, 1 + units, own=own_words)
    _launch(
        forward_kernel,
        launch.programs(units),
        p_x=x,
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        p_seed=seed,
        p_partial_mean=partial_mean,
        p_partial_m2=partial_m2,
        p_words=counters,
        eps=spec.eps,
        **_modulation(modulation),
        **_shape(launch.phase, launch, x, spec),
    )
    return y, mean, rstd


def rewrite(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    launch: Launch,
) -> Tensor:
    """The forward's output once more, from the saved statistics: one read, one write."""
    N, C = x.shape[:2]
    y = torch.empty_like(x, dtype=spec.out_dtype)
    _launch(
        forward_kernel,
        N * ceil_div(C, launch.slab) * launch.parts,
        p_x=x,
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        p_seed=seed,
        p_partial_mean=None,
        p_partial_m2=None,
        p_words=None,
        eps=spec.eps,
        **_modulation(modulation),
        **_shape("rewrite", launch, x, spec),
    )
    return y


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
    """dx and the gradients of the five modulation tensors. dy has the layout of x.

    own_words: as in `words`.
    """
    N, C = x.shape[:2]
    dx = torch.empty_like(x)
    gradients = tuple(
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in modulation
    )
    slabs = ceil_div(C, launch.slab)
    units = N * slabs

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    s1 = s2 = c1 = c2 = counters = partial_s1 = partial_s2 = partial_s3 = group_s1 = group_s2 = None
    summed = modulation.weight is not None or modulation.bias is not None
    if summed:
        s1, s2 = sums(N, C), sums(N, C)
    if launch.split:
        c1, c2 = sums(N, spec.num_groups), sums(N, spec.num_groups)
        partial_s1, partial_s2 = sums(N, launch.splits, C), sums(N, launch.splits, C)
        if modulation.pre_shift is not None:
            partial_s3 = sums(N, launch.splits, C)
        group_s1, group_s2 = _group_parts(x, units, launch, spec)
    if launch.split or summed:
        counters = words(x.device, 1 + slabs + units, own=own_words)
    dweight, dbias, dscale, dshift, dpre_shift = gradients
    _launch(
        backward_kernel,
        launch.programs(units),
        p_dy=dy,
        p_x=x,
        p_dx=dx,
        p_mean=mean,
        p_rstd=rstd,
        p_c1=c1,
        p_c2=c2,
        p_s1=s1,
        p_s2=s2,
        p_seed=seed,
        p_dweight=dweight,
        p_dbias=dbias,
        p_dscale=dscale,
        p_dshift=dshift,
        p_dpre=dpre_shift,
        p_partial_s1=partial_s1,
        p_partial_s2=partial_s2,
        p_partial_s3=partial_s3,
        p_group_s1=group_s1,
        p_group_s2=group_s2,
        p_words=counters,
        N=N,
        BLOCK_SLAB=power_of_2(launch.slab),
        BLOCK_N=max(1, FOLD_ELEMENTS * launch.num_warps // power_of_2(launch.slab)),
        **_modulation(modulation),
        **_shape(launch.phase, launch, x, spec),
        **_registers(launch, x, modulation, seed),
    )
    return dx, gradients


def residual(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(skip + h + bias)·scale, in the wider of the two dtypes; skip has the layout of h."""
    y = torch.empty_like(h, dtype=torch.promote_types(skip.dtype, h.dtype))
    C = h.shape[1]
    channels_last = memory_format(h) != torch.contiguous_format
    columns = C if channels_last else h[0, 0].numel()
    rows = h.numel() // columns
    block_hw = min(power_of_2(columns), STREAM_ELEMENTS)
    block_r = min(power_of_2(rows), STREAM_ELEMENTS // block_hw)
    _launch(
        residual_kernel,
        ceil_div(rows, block_r) * ceil_div(columns, block_hw),
        p_skip=skip,
        p_h=h,
        p_bias=bias,
        p_y=y,
        rows=rows,
        columns=columns,
        C=C,
        scale=scale,
        CHANNELS_LAST=channels_last,
        BLOCK_R=block_r,
        BLOCK_HW=block_hw,
        num_warps=warps_for(block_r * block_hw, THREAD_ELEMENTS["forward"]),
    )
    return y


def _group_parts(x: Tensor, units: int, launch: Launch, spec: Spec) -> tuple[Tensor, Tensor]:
    """Two places for what every part comes to, for each group of its unit."""
    groups = launch.slab // (x.shape[1] // spec.num_groups)
    both = torch.empty((2, units, groups, launch.parts), dtype=torch.float32, device=x.device)
    return both[0], both[1]


def _modulation(modulation: Modulation) -> dict[str, Any]:
    return {
        "p_weight": modulation.weight,
        "p_bias": modulation.bias,
        "p_scale": modulation.scale,
        "p_shift": modulation.shift,
        "p_pre": modulation.pre_shift,
        "scale_n": _row_stride(modulation.scale),
        "shift_n": _row_stride(modulation.shift),
        "pre_n": _row_stride(modulation.pre_shift),
    }


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
        "num_warps": launch.num_warps,
    }


def _registers(
    launch: Launch, x: Tensor, modulation: Modulation, seed: Tensor | None
) -> dict[str, int]:
    """A limit where ptxas, left alone, would spill a few bytes to fit one more program, or take so
    many that one less fits than `tiers.SPLIT_TILES` says. For the backward of divided units."""
    if not launch.split:
        return {}
    if seed is not None:
        return {"maxnreg": 128}
    if memory_format(x) != torch.contiguous_format:
        return {"maxnreg": 96}
    return {} if modulation.pre_shift is not None else {"maxnreg": 64}


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
