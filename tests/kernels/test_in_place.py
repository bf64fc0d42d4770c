"""What an operator returns is its caller's own: no view of anything, to be changed in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.oracle import Problem, problem
from support.running import run_operator
from torch import Tensor, nn

from resblock_bench import reference
from resblock_bench.kernels import GroupNormSiLU, fuse_, norm_act_conv, prefer
from resblock_bench.kernels.dispatch import Backend

LAYOUTS = {"nchw": False, "nhwc": True}
SHAPES = [(2, 8, 4, 4), (2, 8, 1, 1), (1, 8, 3, 3)]
OPTIONS: list[dict[str, bool]] = [{"modulated": False}, {}, {"pre_shift": True}]


def own(t: Tensor) -> None:
    """Whatever may be done in place to a tensor of one's own."""
    assert not t._is_view()
    t.mul_(2)
    t.detach_()


def leaves_of(p: Problem) -> list[Tensor]:
    tensors = (p.x, p.weight, p.bias, p.scale, p.shift, p.pre_shift)
    return [t.requires_grad_() for t in tensors if t is not None]


def fresh(p: Problem) -> Problem:
    fields = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in vars(p).items()}
    return Problem(**fields)


# Triton makes each of its results anew, whatever the call.
CALLS = [
    *(("aten", shape, options) for shape in SHAPES for options in OPTIONS),
    ("triton", SHAPES[0], {"pre_shift": True}),
]


@pytest.mark.parametrize(("backend", "shape", "options"), CALLS, ids=str)
@pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
def test_operator(
    channels_last: bool, backend: Backend, shape: tuple[int, ...], options: dict[str, bool]
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    p = fresh(problem(*shape, groups=2, channels_last=channels_last, **options))
    with prefer(backend):
        own(run_operator(p))
        leaves = leaves_of(p)
        expected, y = 2 * run_operator(p), run_operator(p)
        y.mul_(2)
        assert torch.equal(y, expected)
        for found, truth in zip(
            torch.autograd.grad(y, leaves, p.dy),
            torch.autograd.grad(expected, leaves, p.dy),
            strict=True,
        ):
            assert torch.equal(found, truth)
        own(y)
        for create_graph in (False, True):
            for g in torch.autograd.grad(run_operator(p), leaves, p.dy, create_graph=create_graph):
                own(g)


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "to be differentiated again"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_convolution_behind_it(resample: str | None, create_graph: bool) -> None:
    for dims, convolution in ((1, nn.Conv1d), (2, nn.Conv2d)):
        conv = convolution(8, 8, 3, padding=1)
        p = fresh(problem(2, 8, *(4,) * dims, groups=2))
        leaves = [*leaves_of(p), *conv.parameters()]

        def out(p: Problem = p, conv: nn.Module = conv) -> Tensor:
            return norm_act_conv(
                p.x, 2, p.weight, p.bias, conv, p.scale, p.shift, resample=resample
            )

        for g in torch.autograd.grad(out().sum(), leaves, create_graph=create_graph):
            own(g)
        own(out())


@pytest.mark.parametrize("block", [reference.ResBlock(32, 8, 0.0), reference.EDMBlock(32, 32, 8)])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_blocks(block: nn.Module, mode: str) -> None:
    block = copy.deepcopy(block)
    fuse_(block, mode)
    x, emb = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 8)
    y = block(x, emb)
    y.mul_(2).sum().backward()
    y.detach_()
    own(x.grad)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardswish], ids=lambda a: a.__name__)
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 4, 4), (2, 8, 2, 1, 3, 2)], ids=str)
def test_activation_in_place_behind_a_fused_norm(
    shape: tuple[int, ...], activation: Callable[..., nn.Module]
) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 8), activation(inplace=True))
    fused = copy.deepcopy(model)
    fuse_(fused)
    assert type(fused[0]) is GroupNormSiLU
    results = []
    for m in (model, fused):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = m(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad for p in m.parameters())))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    own(fused[0](x))


def test_residual_addition() -> None:
    pytest.importorskip("triton")
    skip, h, bias = (torch.randn(s, requires_grad=True) for s in ((2, 8, 4, 4), (2, 8, 4, 4), (8,)))
    from resblock_bench.kernels.op import residual_add

    with prefer("triton"):
        own(residual_add(skip, h, bias))
        y = residual_add(skip, h, bias)
        for g in torch.autograd.grad(y.sum(), (skip, h, bias)):
            g.detach_()
