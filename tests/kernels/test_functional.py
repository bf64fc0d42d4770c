"""What the operator refuses, what it says, and what `explain` tells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import problem
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
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"\[0, 1\), got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, r"\[0, 1\), got nan"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p must be a number, got '0.1' \(str\)"),
        ({"dropout_p": None}, TypeError, r"dropout_p must be a number, got None \(NoneType\)"),
        ({"dropout_p": True}, TypeError, "dropout_p must be a number, got True"),
        ({"training": "False"}, TypeError, "training must be True or False, got 'False'"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and at least 0, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and at least 0, got nan"),
        ({"eps": float("inf")}, ValueError, "eps must be finite and at least 0, got inf"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
        ({"eps": torch.tensor(1e-5)}, TypeError, "eps must be a number, got tensor"),
        ({"num_groups": 2.0}, TypeError, r"num_groups must be an integer, got 2.0 \(float\)"),
        ({"num_groups": None}, TypeError, "num_groups must be an integer, got None"),
        ({"num_groups": True}, TypeError, "num_groups must be an integer, got True"),
        ({"num_groups": "2"}, TypeError, "num_groups must be an integer, got '2'"),
        ({"num_groups": -2}, ValueError, "positive divisor of 6"),
        ({"x": np.ones((2, 6, 4), np.float32)}, TypeError, "x is array.*expected a dense tensor"),
        ({"x": None}, TypeError, "x is None .*expected a dense tensor"),
        ({"x": torch.ones(2, 6, 4, dtype=torch.complex64)}, TypeError, "x is torch.complex64"),
        ({"x": torch.ones(2, 6, 4, dtype=torch.bool)}, TypeError, "x is torch.bool"),
        ({"x": torch.ones(2, 6, 4).to(torch.float8_e4m3fn)}, TypeError, "x is torch.float8"),
        ({"x": torch.ones(2, 6, 4).to_sparse()}, TypeError, "x is of layout torch.sparse_coo"),
        (
            {"x": torch.ones(2, 6, 4, device="meta"), "weight": torch.ones(6)},
            ValueError,
            "weight is on cpu and x on meta",
        ),
        ({"scale": 0.5}, TypeError, r"scale is 0.5 \(float\); expected None or a dense tensor"),
        ({"scale": np.ones((2, 6))}, TypeError, "scale is array.*ndarray"),
        ({"shift": torch.ones(2, 6).to_sparse()}, TypeError, "shift is tensor.*dense tensor"),
        ({"weight": torch.ones(6, dtype=torch.complex64)}, TypeError, "weight is torch.complex64"),
        ({"activation": np.ones(2)}, ValueError, "activation must be 'silu' or None, got array"),
        ({"activation": "gelu"}, ValueError, "activation must be 'silu' or None, got 'gelu'"),
    ],
)
def test_bad_input_says_what_is_expected(
    changes: dict[str, Any], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        call(**changes)


def test_numbers_of_other_types_are_numbers() -> None:
    """NumPy's integers, and integers where a float is usual."""
    x = torch.randn(2, 6, 4, 4)
    usual = group_norm_silu(x, 2, eps=0.0, dropout_p=0.0)
    assert torch.equal(group_norm_silu(x, np.int64(2), eps=0, dropout_p=0), usual)
    assert torch.equal(group_norm_silu(x, 2, eps=np.float64(0)), usual)


def test_meta_tensors_have_a_shape() -> None:
    x = torch.empty(2, 6, 4, 4, device="meta", requires_grad=True)
    y = group_norm_silu(x, 2, scale=torch.empty(2, 6, device="meta"))
    assert y.shape == x.shape and y.is_meta


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        (
            {"conv": nn.Linear(6, 6)},
            TypeError,
            r"conv is Linear.*expected Conv1d, Conv2d or Conv3d",
        ),
        ({"conv": None}, TypeError, "conv is None"),
        ({"conv": nn.ConvTranspose2d(6, 6, 3)}, TypeError, r"\(ConvTranspose2d\); expected Conv1d"),
        ({"conv": nn.Conv2d(6, 6, 3, padding="same")}, ValueError, "padding='same'"),
        ({"conv": nn.Conv1d(6, 6, 3)}, ValueError, r"Conv1d of 6 channels; expected Conv2d of 6"),
        ({"conv": nn.Conv2d(8, 6, 3)}, ValueError, r"Conv2d of 8 channels; expected Conv2d of 6"),
        ({"conv": nn.Conv2d(6, 6, 3, device="meta")}, ValueError, "conv is on meta and x on cpu"),
        ({"resample": "left"}, ValueError, "resample must be 'up', 'down' or None, got 'left'"),
        ({"conv_bias": "no"}, TypeError, "conv_bias must be True or False, got 'no'"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an integer, got 2.0"),
        ({"eps": -1.0}, ValueError, "eps must be finite"),
    ],
)
def test_bad_input_of_norm_act_conv(
    changes: dict[str, Any], exception: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 6, 4, 4),
        "num_groups": 2,
        "weight": None,
        "bias": None,
        "conv": nn.Conv2d(6, 6, 3),
    }
    with pytest.raises(exception, match=message):
        norm_act_conv(**(arguments | changes))


def test_convolution_with_other_padding_is_refused() -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        norm_act_conv(torch.randn(2, 6, 4, 4), 2, None, None, conv)


def test_explain_on_the_cpu() -> None:
    text = explain(torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last), 32)
    assert "(2, 64, 8, 8) float32 on cpu, 32 groups of 2 channels" in text
    assert "channels_last" in text
    assert "aten: x is on the CPU" in text
    assert f"versions: torch {torch.__version__.partition('+')[0]}, " in text


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
    with pytest.raises(TypeError, match=r"num_groups must be an integer, got 2\.0"):
        explain(torch.randn(2, 6, 4, 4), 2.0)
    with pytest.raises(TypeError, match="x is array"):
        explain(np.ones((2, 6, 4)), 2)
    with pytest.raises(ValueError, match="5 groups"):
        explain(torch.randn(2, 6, 4, 4), 5)
