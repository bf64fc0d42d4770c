"""The operator against float64 on drawn problems: shapes, strides, dtypes, options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.oracle import Problem, check, problem
from support.running import run_operator

from resblock_bench.kernels import prefer
from resblock_bench.kernels.dispatch import Backend
from resblock_bench.kernels.tiers import Tier

pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """At least eight elements a group: of fewer, the gradient of x is all cancellation."""
    spatial = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    assume(8 <= per_group * torch.Size(spatial).numel() <= 600)
    p = problem(
        draw(st.integers(1, 2)),
        groups * per_group,
        *spatial,
        groups=groups,
        dtype=draw(st.sampled_from(DTYPES)),
        pre_shift=True,
        channels_last=len(spatial) > 1 and draw(st.booleans()),
        activation=draw(st.sampled_from(("silu", None))),
        mean=draw(st.sampled_from((0.0, 3.0))),
        seed=draw(st.integers(0, 9)),
    )
    absent = draw(st.sets(st.sampled_from(("weight", "bias", "scale", "shift", "pre_shift"))))
    p = replace(p, **dict.fromkeys(absent))
    if draw(st.booleans()):  # every second position of a wider tensor
        p = replace(p, x=torch.stack([p.x, -p.x], dim=-1)[..., 0])
    if draw(st.booleans()):
        p = replace(p, dy=p.dy.transpose(0, 1).contiguous().transpose(0, 1))
    return p


def holds(backend: Backend, tier: Tier | None, p: Problem) -> None:
    allowance = 1e-5 if p.x.dtype == torch.float32 else 2e-2
    with prefer(backend, tier):
        check(run_operator, p, ill_conditioned=allowance)


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@given(p=problems())
@settings(SETTINGS, max_examples=60)
def test_in_aten(p: Problem) -> None:
    holds("aten", None, p)


@pytest.mark.parametrize("tier", ["A", "B", "C"])
@given(p=problems())
@settings(SETTINGS, max_examples=6)
def test_in_triton(tier: Tier, p: Problem) -> None:
    pytest.importorskip("triton")
    holds("triton", tier, p)
