"""Running the operator on a `Problem`, in the implementation and the tier that a test asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from oracle import Problem
from torch import Tensor

from resblock_bench.kernels import dispatch, functional

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


def force_tier(monkeypatch: pytest.MonkeyPatch, tier: dispatch.Tier) -> None:
    choose = dispatch.plan

    def plan(x: Tensor, num_groups: int) -> dispatch.Plan:
        return choose(x, num_groups, tier)

    monkeypatch.setattr(functional, "plan", plan)
