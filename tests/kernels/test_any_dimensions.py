"""A fused bare norm takes input of every number of dimensions that `nn.GroupNorm` takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resblock_bench.kernels import GroupNormSiLU, fuse_

SHAPES = [(3, 8), (3, 8, 5), (2, 8, 3, 4), (2, 8, 2, 3, 2), (2, 8, 2, 1, 3, 2), (1, 8, *(2,) * 6)]


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}-D")
def test_output_and_gradients(shape: tuple[int, ...], transposed: bool) -> None:
    norm = nn.GroupNorm(2, 8)
    nn.init.normal_(norm.weight)
    x = torch.randn(shape)
    if transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    dy, results = torch.randn(shape), []
    for _ in range(2):
        leaf = x.detach().requires_grad_()
        y = norm(leaf)
        assert y.shape == shape
        results.append((y, *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], dy)))
        fuse_(norm)
    assert type(norm) is GroupNormSiLU
    for found, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 2, 2, 2, 2), (2, 8, 0, 2, 2, 2)], ids=str)
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    assert GroupNormSiLU(2, 8)(torch.empty(shape)).shape == shape


def test_another_dimension_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(8,\); expected \(N, C, \*spatial\)"):
        GroupNormSiLU(2, 8)(torch.randn(8))
