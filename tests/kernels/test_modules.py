from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resblock_bench.kernels import GroupNormSiLU


def test_is_group_norm_then_silu() -> None:
    plain, fused = nn.GroupNorm(4, 8), GroupNormSiLU(4, 8)
    with torch.no_grad():
        plain.weight.normal_()
        plain.bias.normal_()
    fused.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(x), F.silu(plain(x)))
    scale, shift, pre = torch.randn(3, 2, 8, 1, 1)
    expected = F.silu(plain(x + pre) * (1 + scale) + shift)
    torch.testing.assert_close(
        fused(x, *(t.flatten(1) for t in (scale, shift, pre))), expected, rtol=1e-5, atol=1e-5
    )


def test_without_activation_or_affine() -> None:
    x = torch.randn(2, 8, 5)
    fused = GroupNormSiLU(4, 8, affine=False, activation=None)
    torch.testing.assert_close(fused(x), F.group_norm(x, 4))
    assert not list(fused.parameters())


def test_vectors() -> None:
    x = torch.randn(3, 8)
    fused = GroupNormSiLU(2, 8)
    torch.testing.assert_close(fused(x), F.silu(F.group_norm(x, 2)))


def test_is_called_by_keyword_as_group_norm_is() -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(
        GroupNormSiLU(2, 8, activation=None)(input=x), nn.GroupNorm(2, 8)(input=x)
    )


def test_bad_activation_and_repr() -> None:
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        GroupNormSiLU(2, 8, activation="relu")
    assert "activation=None" in repr(GroupNormSiLU(2, 8, activation=None))
