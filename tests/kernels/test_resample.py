from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from resblock_bench import reference
from resblock_bench.kernels.resample import Resample


@pytest.mark.parametrize("mode", ["up", "down"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_is_the_reference_and_backward_its_adjoint(dims: int, mode: str) -> None:
    module = (reference.Upsample if mode == "up" else reference.Downsample)(2, False, dims)
    h = torch.randn(2, 2, *(4,) * dims, dtype=torch.float64, requires_grad=True)
    resample = Resample(mode)
    out = module(h)
    assert torch.equal(resample.forward(h), out)
    g = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, h, g)
    torch.testing.assert_close(resample.backward(g, h.shape), expected)
    assert gradcheck(resample.forward, h)


def test_none_is_the_identity() -> None:
    h = torch.randn(1, 2, 3)
    assert Resample().forward(h) is h and Resample().backward(h, h.shape) is h
