"""Launches of the Triton kernels: plain tensors in and out, every allocation made here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resblock_bench.kernels.backward import backward_kernel, parameter_gradients_kernel
from resblock_bench.kernels.forward import forward_kernel
from resblock_bench.kernels.launcher import Recorded as Recorded
from resblock_bench.kernels.launcher import launch_once
from resblock_bench.kernels.launcher import recording as recording
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

GRADIENT_BLOCK = (8, 64)  # samples, channels
# Of the backward's split phases. Left alone, ptxas spills a few bytes to fit one more block.
MAX_REGISTERS = 128


def forward(
    x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """y = dropout(act(norm(x + pre_shift)·γ' + β')), and every group's mean and rstd (N, G)."""
    N = x.shape[0]
    y = torch.empty_like(x, dtype=spec.out_dtype)
    mean = torch.empty((N, spec.num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    common = {
        "p_x": x,
        "p_y": y,
        "p_mean": mean,
        "p_rstd": rstd,
        "p_seed": seed,
        "eps": spec.eps,
        **_common(x, modulation, spec),
    }
    names = ("p_partial_mean", "p_partial_m2")
    _run(forward_kernel, "statistics", common, names, x, launch)
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
    units = N * ceil_div(C, launch.slab)
    common = _common(x, modulation, spec)
    launch_once(
        forward_kernel,
        units * launch.parts,
        p_x=x,
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        p_seed=seed,
        eps=spec.eps,
        **common,
        **_absent("p_partial_mean", "p_partial_m2", "p_barrier"),
        **_shape("rewrite", launch, common, 0, units),
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
) -> tuple[Tensor, Gradients]:
    """dx and the gradients of the five modulation tensors. dy has the layout of x."""
    N, C = x.shape[:2]
    dx = torch.empty_like(x)
    s1 = torch.empty((N, C), dtype=torch.float32, device=x.device)
    s2 = torch.empty_like(s1)
    db = torch.empty_like(s1) if modulation.pre_shift is not None else None
    common = {
        "p_dy": dy,
        "p_x": x,
        "p_dx": dx,
        "p_mean": mean,
        "p_rstd": rstd,
        "p_s1": s1,
        "p_s2": s2,
        "p_db": db,
        "p_seed": seed,
        **_common(x, modulation, spec),
    }
    if launch.tier in ("C", "D"):
        common["maxnreg"] = MAX_REGISTERS
    names = ["p_partial_s1", "p_partial_s2", "p_partial_s3"]
    if db is None:
        common[names.pop()] = None
    _run(backward_kernel, "sums", common, names, x, launch)
    return dx, _parameter_gradients(s1, s2, db, modulation)


def residual(skip: Tensor, h: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(skip + h + bias)·scale, in the wider of the two dtypes; skip has the layout of h."""
    y = torch.empty_like(h, dtype=torch.promote_types(skip.dtype, h.dtype))
    C = h.shape[1]
    channels_last = memory_format(h) != torch.contiguous_format
    columns = C if channels_last else h[0, 0].numel()
    rows = h.numel() // columns
    block_hw = min(power_of_2(columns), STREAM_ELEMENTS)
    block_r = min(power_of_2(rows), STREAM_ELEMENTS // block_hw)
    launch_once(
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


def _run(
    kernel: Any,
    first_phase: str,
    common: dict[str, Any],
    partial_names: list[str] | tuple[str, ...],
    x: Tensor,
    launch: Launch,
) -> None:
    """All launches of one direction, with their partial sums [N, splits, C]."""
    N, C = x.shape[:2]
    units = N * ceil_div(C, launch.slab)
    absent = _absent(*partial_names, "p_barrier")
    if launch.tier in ("A", "B"):
        launch_once(kernel, units, **common, **absent, **_shape("whole", launch, common, 0, units))
        return
    for name in partial_names:
        absent[name] = torch.empty((N, launch.splits, C), dtype=torch.float32, device=x.device)
    if launch.cooperative:
        absent["p_barrier"] = torch.zeros(launch.units, dtype=torch.int32, device=x.device)
        launch_once(
            kernel,
            launch.units * launch.parts,
            **common,
            **absent,
            **_shape("cooperative", launch, common, 0, units),
            launch_cooperative_grid=True,
        )
        return
    for first in range(0, units, launch.units):
        end = min(units, first + launch.units)
        for phase in (first_phase, "apply"):
            launch_once(
                kernel,
                (end - first) * launch.parts,
                **common,
                **absent,
                **_shape(phase, launch, common, first, end),
            )


def _parameter_gradients(
    s1: Tensor, s2: Tensor, db: Tensor | None, modulation: Modulation
) -> Gradients:
    N, C = s1.shape
    weight, bias, scale, shift, pre_shift = gradients = tuple(
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in modulation
    )
    if any(t is not None for t in gradients):
        launch_once(
            parameter_gradients_kernel,
            ceil_div(C, GRADIENT_BLOCK[1]),
            p_s1=s1,
            p_s2=s2,
            p_db=db,
            p_weight=modulation.weight,
            p_bias=modulation.bias,
            p_scale=modulation.scale,
            p_dweight=weight,
            p_dbias=bias,
            p_dscale=scale,
            p_dshift=shift,
            p_dpre=pre_shift,
            N=N,
            C=C,
            scale_n=_row_stride(modulation.scale),
            BLOCK_N=GRADIENT_BLOCK[0],
            BLOCK_C=GRADIENT_BLOCK[1],
            num_warps=4,
        )
    return gradients


def _common(x: Tensor, modulation: Modulation, spec: Spec) -> dict[str, Any]:
    return {
        "p_weight": modulation.weight,
        "p_bias": modulation.bias,
        "p_scale": modulation.scale,
        "p_shift": modulation.shift,
        "p_pre": modulation.pre_shift,
        "scale_n": _row_stride(modulation.scale),
        "shift_n": _row_stride(modulation.shift),
        "pre_n": _row_stride(modulation.pre_shift),
        "C": x.shape[1],
        "HW": x[0, 0].numel(),
        "CG": x.shape[1] // spec.num_groups,
        "CHANNELS_LAST": memory_format(x) != torch.contiguous_format,
        "ACTIVATION": spec.activation,
        "dropout_p": spec.dropout_p,
    }


def _shape(
    phase: str, launch: Launch, common: dict[str, Any], first: int, end: int
) -> dict[str, Any]:
    return {
        "PHASE": phase,
        "first": first,
        "end": end,
        "splits": launch.splits,
        "chunk": launch.chunk,
        "SLAB": launch.slab,
        "BLOCK_SLAB": power_of_2(launch.slab),
        "BLOCK_C": launch.block_c,
        "BLOCK_HW": launch.block_hw,
        "BLOCK_S": power_of_2(launch.splits),
        "BLOCK_G": power_of_2(launch.slab // common["CG"]),
        "RESIDENT": launch.tier == "A",
        "EVEN": common["HW"] % launch.block_hw == 0,
        "num_warps": launch.num_warps,
    }


def _absent(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
