"""The Triton operators as PyTorch sees them: schemas, fakes, autograd, and graphs made of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from support.oracle import problem
from torch import Tensor, nn

from resblock_bench.kernels import ResBlock, fuse_, group_norm_silu, prefer
from resblock_bench.kernels.blocks import CheckpointMode

pytest.importorskip("triton")
OPS = torch.ops.resblock_bench
# What opcheck compiles with is deprecated in places that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with prefer("triton"):
        yield


def arguments(*, everything: bool, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    p = problem(
        2, 6, 4, 5, groups=2, affine=everything, modulated=everything, pre_shift=everything,
        dtype=dtype,
    )  # fmt: skip
    tensors = [p.x, p.weight, p.bias, p.scale, p.shift, p.pre_shift]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    seed = torch.tensor(7) if everything else None
    return (*leaves, seed, 2, 1e-5, True, 0.25 if everything else 0.0, dtype)


@pytest.mark.parametrize("everything", [False, True], ids=["x alone", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator(everything: bool, dtype: torch.dtype) -> None:
    """Schema, fake shapes, autograd registration, and the same result through AOTAutograd."""
    torch.library.opcheck(
        OPS.group_norm_silu.default, arguments(everything=everything, dtype=dtype)
    )


@pytest.mark.parametrize("everything", [False, True], ids=["x alone", "everything"])
def test_backward_and_rewrite_operators(everything: bool) -> None:
    x, *call = (
        t.detach() if isinstance(t, Tensor) else t for t in arguments(everything=everything)
    )
    y, mean, rstd = OPS.group_norm_silu(x, *call)
    torch.library.opcheck(OPS.group_norm_silu_rewrite.default, (x, mean, rstd, *call))
    torch.library.opcheck(OPS.group_norm_silu_backward.default, (y, x, mean, rstd, *call))
    assert torch.equal(OPS.group_norm_silu_rewrite(x, mean, rstd, *call), y)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_residual_operator(bias: bool) -> None:
    tensors = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2)]
    b = torch.randn(3, requires_grad=True) if bias else None
    torch.library.opcheck(OPS.residual_add.default, (*tensors, b, 0.5))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 6, 65, 65), (3, 5, 7, 9), (2, 70, 30, 3)], ids=str)
def test_residual_values(shape: tuple[int, ...], channels_last: bool) -> None:
    """More than one tile both ways; skip comes in another layout than h."""
    skip, h, bias = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    if channels_last:
        h = h.contiguous(memory_format=torch.channels_last)
    y = OPS.residual_add(skip, h, bias, 0.5)
    torch.testing.assert_close(y, (skip + h + bias[:, None, None]) * 0.5)
    assert y.stride() == h.stride()


def test_operators_called_with_strided_tensors_or_wrong_shapes() -> None:
    """Nobody has checked these arguments: they are copied, or refused, and never misread."""
    x, *call = arguments(everything=False)
    assert isinstance(x, Tensor)
    wide = torch.stack([x.detach(), x.detach()], dim=-1)[..., 0]
    with torch.no_grad():
        assert torch.equal(OPS.group_norm_silu(wide, *call)[0], OPS.group_norm_silu(x, *call)[0])
        with pytest.raises(ValueError, match=r"expected shape \(2, 6, 4, 5\), received \(1, 6"):
            OPS.residual_add(x[:1], x, None, 1.0)


def test_tracing_sees_the_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: group_norm_silu(x, 2))(torch.randn(2, 6, 4, 4)).graph
    assert any("group_norm_silu" in str(node.target) for node in graph.nodes)


def test_registered_autograd_equals_the_eager_path() -> None:
    inputs = arguments(everything=True)
    y = OPS.group_norm_silu(*inputs)[0]
    leaves = [t for t in inputs[:6] if isinstance(t, Tensor)]
    registered = torch.autograd.grad(y.square().sum(), leaves)
    from resblock_bench.kernels.op import GroupNormSiLUFunction
    from resblock_bench.kernels.spec import Spec

    y = GroupNormSiLUFunction.apply(*inputs[:7], Spec(*inputs[7:]))
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), leaves), registered, strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivative_through_the_registry_raises() -> None:
    x, *call = arguments(everything=False)
    assert isinstance(x, Tensor)
    (dx,) = torch.autograd.grad(OPS.group_norm_silu(x, *call)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (x.sum() + dx.square().sum()).backward()


def test_operator_where_triton_does_not_run_says_what_to_call() -> None:
    x, *call = arguments(everything=False)
    assert isinstance(x, Tensor)
    call[-1] = torch.float64
    with pytest.raises(RuntimeError, match=r"x is float64\. Call resblock_bench"):
        OPS.group_norm_silu(x.double(), *call)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_block_compiles_into_one_graph(checkpoint: CheckpointMode) -> None:
    """Through AOTAutograd, with dropout: the same output and gradients as eager."""
    torch.manual_seed(0)
    block = ResBlock(32, 64, 0.5, use_scale_shift_norm=True, checkpoint=checkpoint)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    # Channels-last, where one program has all the groups: the interpreter's time is programs.
    x = torch.randn(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    emb = torch.randn(1, 64)
    # Static, which another test's shapes would change: with dynamic ones torch up to 2.11 does not
    # know that a convolution's output will be channels-last, too.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    outcomes = []
    for run in (block, compiled):
        block.zero_grad()
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = run(leaf, emb)
        y.square().sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
        outcomes.append([y, leaf.grad, *(p.grad for p in block.parameters())])
    for eager, graph in zip(*outcomes, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)


def test_exports_as_one_node() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return group_norm_silu(x, 2)

    program = torch.export.export(Net(), (torch.randn(2, 6, 4, 4),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("resblock_bench.group_norm_silu" in target for target in targets), targets


def test_fused_modules_copy_and_pickle() -> None:
    import io

    model = nn.Sequential(nn.GroupNorm(2, 32), ResBlock(32, 64, 0.0, checkpoint="selective"))
    fuse_(model)
    x = torch.randn(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    emb = torch.randn(1, 64)
    y = model[1](model[0](x), emb)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert other[1].checkpoint == "selective"
        assert torch.equal(other[1](other[0](x), emb), y)
