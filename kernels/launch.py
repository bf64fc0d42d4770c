"""Launches of the Triton kernels: plain tensors in and out, every allocation made here.

The same three functions as in `aten.py`, with a `Plan` that says how to launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resblock_bench.kernels.backward import (
    fold_sums_kernel,
    group_backward_kernel,
    input_gradient_kernel,
    sums_kernel,
)
from resblock_bench.kernels.dispatch import Launch, Plan, ceil_div, power_of_2
from resblock_bench.kernels.forward import (
    apply_kernel,
    fold_statistics_kernel,
    group_forward_kernel,
    statistics_kernel,
)
from resblock_bench.kernels.spec import Modulation, Spec


def forward(
    x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """y = dropout(act(norm(x + pre_shift)·γ' + β')), and every group's mean and rstd (N, G)."""
    assert plan.forward is not None
    launch = plan.forward
    N, C, HW, G = _sizes(x, spec)
    y = torch.empty_like(x, dtype=spec.out_dtype, memory_format=plan.memory_format)
    mean = torch.empty((N, G), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if launch.tier != "D":
        slabs = ceil_div(C, launch.slab)
        group_forward_kernel[(N * slabs,)](
            p_x=x,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_seed=seed,
            slabs=slabs,
            eps=spec.eps,
            ACTIVATION=spec.activation,
            dropout_p=spec.dropout_p,
            **_modulation(modulation),
            **_geometry(x, spec, plan),
            **_whole_groups(launch, C // G),
        )
        return y, mean, rstd
    partial_mean = torch.empty((N, launch.splits, C), dtype=torch.float32, device=x.device)
    partial_m2 = torch.empty_like(partial_mean)
    geometry = _geometry(x, spec, plan)
    split = _split(launch, C)
    statistics_kernel[_grid(N, C, launch)](
        p_x=x,
        p_pre=modulation.pre_shift,
        p_partial_mean=partial_mean,
        p_partial_m2=partial_m2,
        **_row_strides("pre", modulation.pre_shift),
        **{k: v for k, v in geometry.items() if k != "CG"},
        **split,
    )
    fold_statistics_kernel[(N * G,)](
        p_partial_mean=partial_mean,
        p_partial_m2=partial_m2,
        p_mean=mean,
        p_rstd=rstd,
        C=C,
        HW=HW,
        CG=C // G,
        splits=launch.splits,
        chunk=launch.chunk,
        eps=spec.eps,
        BLOCK_CG=power_of_2(C // G),
        BLOCK_S=power_of_2(launch.splits),
    )
    _apply(x, y, mean, rstd, modulation, seed, spec, plan, launch)
    return y, mean, rstd


def recompute(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    plan: Plan,
) -> Tensor:
    """The forward's output once more, from the saved statistics: one read, one write."""
    assert plan.rewrite is not None
    y = torch.empty_like(x, dtype=spec.out_dtype, memory_format=plan.memory_format)
    _apply(x, y, mean, rstd, modulation, seed, spec, plan, plan.rewrite)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    plan: Plan,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """dx, and the sums (S1, S2, db) of `Modulation.gradients`."""
    assert plan.backward is not None
    launch = plan.backward
    N, C, HW, G = _sizes(x, spec)
    dx = torch.empty_like(x, memory_format=plan.memory_format)
    s1 = torch.empty((N, C), dtype=torch.float32, device=x.device)
    s2 = torch.empty_like(s1)
    db = torch.empty_like(s1) if modulation.pre_shift is not None else None
    common = {
        "p_dy": dy,
        "p_x": x,
        "p_mean": mean,
        "p_rstd": rstd,
        "p_seed": seed,
        "dropout_p": spec.dropout_p,
        "ACTIVATION": spec.activation,
        **_modulation(modulation),
        **_geometry(x, spec, plan),
    }
    if launch.tier != "D":
        slabs = ceil_div(C, launch.slab)
        group_backward_kernel[(N * slabs,)](
            p_dx=dx,
            p_s1=s1,
            p_s2=s2,
            p_db=db,
            slabs=slabs,
            **common,
            **_whole_groups(launch, C // G),
        )
        return dx, (s1, s2, db)
    partial_s1 = torch.empty((N, launch.splits, C), dtype=torch.float32, device=x.device)
    partial_s2 = torch.empty_like(partial_s1)
    partial_s3 = torch.empty_like(partial_s1) if db is not None else None
    c1 = torch.empty((N, G), dtype=torch.float32, device=x.device)
    c2 = torch.empty_like(c1)
    split = _split(launch, C)
    sums_kernel[_grid(N, C, launch)](
        p_partial_s1=partial_s1,
        p_partial_s2=partial_s2,
        p_partial_s3=partial_s3,
        **common,
        **split,
    )
    fold_sums_kernel[(N * G,)](
        p_partial_s1=partial_s1,
        p_partial_s2=partial_s2,
        p_partial_s3=partial_s3,
        p_rstd=rstd,
        p_weight=modulation.weight,
        p_scale=modulation.scale,
        p_s1=s1,
        p_s2=s2,
        p_db=db,
        p_c1=c1,
        p_c2=c2,
        C=C,
        HW=HW,
        CG=C // G,
        splits=launch.splits,
        **_row_strides("scale", modulation.scale),
        BLOCK_CG=power_of_2(C // G),
        BLOCK_S=power_of_2(launch.splits),
    )
    input_gradient_kernel[_grid(N, C, launch)](
        p_dx=dx,
        p_c1=c1,
        p_c2=c2,
        **common,
        **split,
    )
    return dx, (s1, s2, db)


def _apply(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
    plan: Plan,
    launch: Launch,
) -> None:
    N, C = x.shape[:2]
    apply_kernel[_grid(N, C, launch)](
        p_x=x,
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        p_seed=seed,
        dropout_p=spec.dropout_p,
        ACTIVATION=spec.activation,
        **_modulation(modulation),
        **_geometry(x, spec, plan),
        **_split(launch, C),
    )


def _sizes(x: Tensor, spec: Spec) -> tuple[int, int, int, int]:
    N, C = x.shape[:2]
    return N, C, x[0, 0].numel(), spec.num_groups


def _grid(N: int, C: int, launch: Launch) -> tuple[int]:
    return (N * ceil_div(C, launch.block_c) * launch.splits,)


def _geometry(x: Tensor, spec: Spec, plan: Plan) -> dict[str, int]:
    _, C, HW, G = _sizes(x, spec)
    contiguous = plan.memory_format == torch.contiguous_format
    return {
        "C": C,
        "HW": HW,
        "CG": C // G,
        "stride_c": HW if contiguous else 1,
        "stride_hw": 1 if contiguous else C,
    }


def _whole_groups(launch: Launch, CG: int) -> dict[str, Any]:
    return {
        "SLAB": launch.slab,
        "BLOCK_C": launch.block_c,
        "BLOCK_HW": launch.block_hw,
        "ONE_GROUP": launch.slab == CG,
        "RESIDENT": launch.tier == "A",
        "num_warps": launch.num_warps,
    }


def _split(launch: Launch, C: int) -> dict[str, int]:
    return {
        "blocks_c": ceil_div(C, launch.block_c),
        "splits": launch.splits,
        "chunk": launch.chunk,
        "BLOCK_C": launch.block_c,
        "BLOCK_HW": launch.block_hw,
        "num_warps": launch.num_warps,
    }


def _modulation(modulation: Modulation) -> dict[str, Any]:
    return {
        "p_weight": modulation.weight,
        "p_bias": modulation.bias,
        "p_scale": modulation.scale,
        "p_shift": modulation.shift,
        "p_pre": modulation.pre_shift,
        **_row_strides("scale", modulation.scale),
        **_row_strides("shift", modulation.shift),
        **_row_strides("pre", modulation.pre_shift),
    }


def _row_strides(name: str, rows: Tensor | None) -> dict[str, int]:
    return {
        f"{name}_n": 0 if rows is None else rows.stride(0),
        f"{name}_c": 0 if rows is None else rows.stride(1),
    }
