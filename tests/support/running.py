"""Running the operator on a `Problem`, in the implementation and the tier that a test asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from resblock_bench.kernels import functional

from .oracle import Problem

Runner = Callable[[Problem], Tensor]


def run_operator(p: Problem, dropout_p: float = 0.0) -> Tensor:
    return functional.group_norm_silu(
        p.x,
        p.num_groups,
        p.weight,
        p.bias,
        p.scale,
        p.shift,
        pre_shift=p.pre_shift,
        eps=p.eps,
        activation=p.activation,
        dropout_p=dropout_p,
    )
