"""What the operator refuses, what it says, and what `explain` tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import problem
from torch import nn

from resblock_bench.kernels import explain, group_norm_silu, norm_act_conv, prefer


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"x": torch.randn(2, 6, 4, 4), "num_groups": 2}
    return group_norm_silu(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"num_groups": 4}, ValueError, "6 channels cannot be divided into 4 groups"),
        ({"num_groups": 0}, ValueError, "positive divisor of 6"),
        ({"x": torch.randn(2, 6)}, ValueError, "1 to 3 spatial dimensions"),
        ({"x": torch.randn(2, 6, 1, 1, 1, 1)}, ValueError, "1 to 3 spatial dimensions"),
        ({"x": torch.ones(2, 6, 4, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\); expected \(6,\)"),
        ({"scale": torch.ones(2, 6, 1, 1)}, ValueError, r"scale .* expected \(2, 6\)"),
        ({"shift": torch.ones(1, 6)}, ValueError, r"shift .* expected \(2, 6\)"),
        ({"pre_shift": torch.ones(6)}, ValueError, r"pre_shift .* expected \(2, 6\)"),
        ({"scale": torch.ones(2, 6, dtype=torch.int32)}, TypeError, "scale is torch.int32"),
        ({"bias": torch.ones(6, device="meta")}, ValueError, "bias is on meta and x on cpu"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; allowed is 0 ≤ p < 1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; allowed are 'silu' and None"),
    ],
)
def test_bad_input_says_what_is_expected(
    changes: dict[str, Any], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        call(**changes)


def test_convolution_with_other_padding_is_refused() -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        norm_act_conv(torch.randn(2, 6, 4, 4), 2, None, None, conv)


def test_explain_on_the_cpu() -> None:
    text = explain(torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last), 32)
    assert "(2, 64, 8, 8) float32 on cpu, 32 groups of 2 channels" in text
    assert "channels_last" in text
    assert "aten: x is on the CPU" in text


def test_explain_tells_the_tier_and_why() -> None:
    pytest.importorskip("triton")
    with prefer("triton"):
        small = explain(problem(4, 64, 8, 8, groups=32).x, 32)
        large = explain(torch.empty(1, 64, 512, 512), 32)
        huge = explain(torch.empty(1, 1, 4096, 4096), 1)
        strided = explain(torch.empty(1, 64, 8, 16)[..., ::2], 32)
    assert "forward:  tier A: 0.5 KiB a group, in registers" in small
    assert "backward: tier A: 1 KiB a group" in small
    assert "tier C: 2048 KiB a group, second read from L2; " in large
    assert "tier D: 65536 KiB a group, sums and output each read from memory" in huge
    assert "copied once" in strided
    assert "copied once" not in small


def test_explain_refuses_what_the_operator_refuses() -> None:
    with pytest.raises(ValueError, match="5 groups"):
        explain(torch.randn(2, 6, 4, 4), 5)
