"""Calls for which a launch would be another one are told apart, by whatever it follows from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from resblock_bench.kernels import calls, dispatch
from resblock_bench.kernels.spec import Spec

HALF = torch.float16
SPEC = Spec(4, 1e-5, True, 0.0, torch.float32)


def call_of(**changes: Any) -> calls.Call:
    given: dict[str, Any] = {
        "x": torch.empty(2, 16, 4, 4),
        "weight": torch.empty(16),
        "scale": torch.empty(2, 16),
        "seed": None,
        "mean": torch.empty(2, 4),
        "spec": SPEC,
        **changes,
    }
    rows = (given["weight"], None, given["scale"], given.get("shift"), None)
    return calls.of(given["x"], rows, given["spec"], given["seed"], given["mean"])


def test_calls_of_one_kind_share_their_launches() -> None:
    assert call_of() is call_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.empty(2, 16, 4, 4, dtype=HALF)},
        {"x": torch.empty(2, 16, 2, 8)},
        {"x": torch.empty(2, 16, 4, 4).to(memory_format=torch.channels_last)},
        {"x": torch.empty(2, 16, 4, 4, device="meta")},
        {"weight": None},
        {"weight": torch.empty(16, dtype=HALF)},
        {"scale": torch.empty(2, 16, dtype=torch.bfloat16)},
        {"scale": torch.empty(2, 32).chunk(2, dim=1)[0]},
        {"shift": torch.empty(2, 16)},
        {"seed": torch.empty(1, dtype=torch.int64)},
        {"mean": torch.empty(2, 4, dtype=torch.float64)},
        {"spec": SPEC._replace(activation=False)},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_calls_of_other_kinds_do_not(changes: dict[str, Tensor]) -> None:
    assert call_of(**changes) is not call_of()
    assert call_of(**changes) is call_of(**changes)


def test_a_preferred_tier_makes_another_kind() -> None:
    with dispatch.prefer("triton", tier="D"):
        preferred = call_of()
    assert preferred is not call_of()


def residual_of(**changes: Any) -> Any:
    skip, h, bias = torch.empty(2, 16, 4, 4), torch.empty(2, 16, 4, 4), torch.empty(16)
    given: dict[str, Any] = {"skip": skip, "h": h, "bias": bias, "scale": 1.0, **changes}
    return calls.residual_of(**given)


@pytest.mark.parametrize(
    "changes",
    [
        {"skip": torch.empty(2, 16, 4, 4, dtype=HALF)},
        {"h": torch.empty(2, 16, 4, 4, dtype=HALF)},
        {"h": torch.empty(1, 16, 4, 4)},
        {"h": torch.empty(2, 16, 4, 4).to(memory_format=torch.channels_last)},
        {"bias": None},
        {"bias": torch.empty(16, dtype=HALF)},
        {"scale": 0.5},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_residual_additions_of_other_kinds_are_told_apart(changes: dict[str, Any]) -> None:
    assert residual_of(**changes) is not residual_of()
    assert residual_of(**changes) is residual_of(**changes)
