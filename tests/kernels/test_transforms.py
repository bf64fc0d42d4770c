"""The operator and the blocks under torch.func, against eager PyTorch under the same transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from resblock_bench import kernels, reference
from resblock_bench.kernels import group_norm_silu, norm_act_conv, prefer

pytestmark = pytest.mark.slow

Function = Callable[..., Tensor]
B, N, C = 3, 2, 4  # calls, samples, channels


@pytest.fixture(autouse=True, params=["aten", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with prefer(request.param):
        yield


def spread(rows: Tensor, x: Tensor) -> Tensor:
    return rows[(..., *(None,) * (x.dim() - 2))]


def eager(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_shift: Tensor | None = None,
) -> Tensor:
    if pre_shift is not None:
        x = x + spread(pre_shift, x)
    h = F.group_norm(x, 2, weight, bias)
    if scale is not None:
        h = h * (1 + spread(scale, x))
    return F.silu(h if shift is None else h + spread(shift, x))


def ours(x: Tensor, *tensors: Tensor | None) -> Tensor:
    *tensors, pre_shift = (*tensors, *(None,) * (5 - len(tensors)))
    return group_norm_silu(x, 2, *tensors, pre_shift=pre_shift)


def loss(f: Function) -> Function:
    return lambda *arguments: (f(*arguments) ** 2).sum()


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


x = normal(B, N, C, 3, 3, seed=1)
w, b = normal(C, seed=2), normal(C, seed=3)  # of all calls
W, BIAS = normal(B, C, seed=4), normal(B, C, seed=5)  # one a call
s, t, p = (normal(N, C, seed=i) for i in (6, 7, 8))
S, T, P = (normal(B, N, C, seed=i) for i in (9, 10, 11))
ALL = (0, 1, 2, 3, 4, 5)


def over_captured(f: Function) -> tuple[Tensor, ...]:
    """Plain autograd around vmap, of a tensor that the mapped function captured."""
    weight = w.clone().requires_grad_()
    y = vmap(lambda bias: f(x[0], weight, bias))(BIAS)
    return torch.autograd.grad(y.square().sum(), [weight])


def around_vmap(f: Function) -> tuple[Tensor, ...]:
    leaves = [u.clone().requires_grad_() for u in (x, w, b)]
    return torch.autograd.grad(vmap(f, (0, None, None))(*leaves).square().sum(), leaves)


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "vmap over x": lambda f: vmap(f, (0, None, None))(x, w, b),
    "vmap over x alone": lambda f: vmap(f)(x),
    "vmap over another dimension": lambda f: vmap(f, (-1, None, None), 1)(x.movedim(0, -1), w, b),
    "vmap over parameters": lambda f: vmap(f, (None, 0, 0))(x[0], W, BIAS),
    "vmap over weight": lambda f: vmap(f, (None, 0, None))(x[0], W, b),
    "vmap over everything": lambda f: vmap(f)(x, W, BIAS, S, T, P),
    "vmap over modulation": lambda f: vmap(f, (None, None, None, 0, 0, 0))(x[0], w, b, S, T, P),
    "vmap over mixed dimensions": lambda f: vmap(f, (1, 1, 0, 2, None, 1))(
        x.movedim(0, 1), W.t(), BIAS, S.movedim(0, 2), t, P.movedim(0, 1)
    ),
    "vmap of vmap": lambda f: vmap(vmap(f, (None, 0, 0)), (0, None, None))(x, W, BIAS),
    "grad": lambda f: grad(loss(f), ALL)(x[0], w, b, s, t, p),
    "vjp": lambda f: vjp(f, x[0], w, b)[1](x[1]),
    "gradients of each sample": lambda f: vmap(
        grad(loss(f), ALL), (0, None, None, None, None, None)
    )(x, w, b, s, t, p),
    "gradients without affine": lambda f: vmap(grad(loss(f), (0, 3)), (0, None, None, 0, 0))(
        x, None, None, S, T
    ),
    "gradients of weight alone": lambda f: vmap(grad(loss(f), 1), (0, None))(x, w),
    "gradients of an ensemble": lambda f: vmap(grad(loss(f), (0, 1, 2)), (None, 0, 0))(
        x[0], W, BIAS
    ),
    "vmap of vmap of grad": lambda f: vmap(
        vmap(grad(loss(f), (0, 1)), (0, None, None)), (None, 0, 0)
    )(x, W, BIAS),
    "grad of vmap": lambda f: grad(lambda *a: vmap(f, (0, None, 0))(*a).square().sum(), (0, 1, 2))(
        x, w, BIAS
    ),
    "vmap over gradients": lambda f: vmap(lambda dy: vjp(f, x[0], w, b)[1](dy))(x),
    "jacrev": lambda f: jacrev(f, (0, 1, 2))(x[0, :1], w, b),
    "autograd around vmap": around_vmap,
    "autograd of a captured tensor": over_captured,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_is_eager_under_the_same_transform(transform: Callable[[Function], Any]) -> None:
    expected, found = tree_leaves(transform(eager)), tree_leaves(transform(ours))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_channels_last_within_vmap() -> None:
    """PyTorch's own group norm cannot be asked for its layout there."""
    channels_last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    y = vmap(ours, (0, None, None))(channels_last, w, b)
    torch.testing.assert_close(y, vmap(eager, (0, None, None))(x, w, b))


@pytest.mark.parametrize(
    "second",
    [
        lambda f: grad(lambda v: grad(f)(v).sum())(x[0]),
        lambda f: vmap(grad(lambda v: grad(f)(v).sum()))(x),
        lambda f: jacrev(jacrev(f))(x[0, :1]),
    ],
    ids=["grad of grad", "in vmap", "jacrev of jacrev"],
)
def test_second_derivative_says_so(second: Callable[[Function], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"differentiated once.*Use resblock_bench\.reference"):
        second(lambda v: ours(v, w, b).square().sum())


def test_second_derivative_around_torch_func_says_so() -> None:
    leaf = x[0].clone().requires_grad_()
    inner = grad(lambda v: ours(v, w, b).square().sum())(leaf)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(inner.square().sum(), leaf)


# PyTorch compiles decompositions for forward mode, and warns of itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "forward_mode",
    [
        lambda f: jvp(f, (x[0],), (x[1],)),
        lambda f: jacfwd(f)(x[0]),
        lambda f: hessian(lambda v: f(v).sum())(x[0]),
    ],
    ids=["jvp", "jacfwd", "hessian"],
)
def test_forward_mode_says_what_to_use(forward_mode: Callable[[Function], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*vjp or jacrev"):
        forward_mode(lambda v: ours(v, w, b))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_a_tangent_is_refused_and_not_lost(grad_mode: Callable[[], Any]) -> None:
    with grad_mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[1])
        for _ in range(2):  # a call of a new kind, and one like an earlier one
            with pytest.raises(NotImplementedError, match="jvp"):
                ours(dual, w, b)


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_a_batch_of_gradients_says_what_to_use(checkpoint: str) -> None:
    block = kernels.ResBlock(32, 24, 0.0, checkpoint=checkpoint)
    leaf = normal(1, 32, 2, 2, seed=20).requires_grad_()
    embedding = normal(1, 24, seed=21)
    for _ in range(2):  # calls of new kinds, and calls like earlier ones
        for y in ours(leaf), block(leaf, embedding):
            directions = torch.ones(3, *y.shape)
            with pytest.raises(NotImplementedError, match=r"is_grads_batched=True.*vmap over"):
                torch.autograd.grad(y, leaf, directions, is_grads_batched=True)


def test_dropout_draws_as_vmap_was_told() -> None:
    same = x[:1].expand(B, -1, -1, -1, -1)

    def drop(v: Tensor) -> Tensor:
        return group_norm_silu(v, 2, w, b, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(drop)(same)
    alike = vmap(drop, randomness="same")(same) != 0
    differing = vmap(drop, randomness="different")(same) != 0
    assert torch.equal(alike[0], alike[1]) and torch.equal(alike[0], alike[2])
    assert not torch.equal(differing[0], differing[1])
    assert 0.2 < float(differing.double().mean()) < 0.8


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_with_dropout_are_those_of_the_output(randomness: str) -> None:
    """The backward draws the forward's masks: the gradient of shift is the sum of what is kept."""

    def both(v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        y, back = vjp(
            lambda u: group_norm_silu(v, 2, shift=u, activation=None, dropout_p=0.5), shift
        )
        return y, back(torch.ones_like(y))[0]

    y, dshift = vmap(both, randomness=randomness)(x, T)
    torch.testing.assert_close(dshift, (y != 0).sum((3, 4)) * 2.0)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_norm_act_conv(resample: str | None) -> None:
    conv = nn.Conv2d(C, 5, 3, padding=1)

    def plain(v: Tensor, weight: Tensor) -> Tensor:
        h = eager(v, weight, b)
        if resample:
            h = F.interpolate(h, scale_factor=2.0) if resample == "up" else F.avg_pool2d(h, 2)
        return conv(h)

    def fused(v: Tensor, weight: Tensor) -> Tensor:
        return norm_act_conv(v, 2, weight, b, conv, resample=resample)

    expected, found = (vmap(grad(loss(f), (0, 1)), (0, None))(x, w) for f in (plain, fused))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


BLOCKS = {
    "scale-shift": ("ResBlock", (32, 24, 0.0), {"use_scale_shift_norm": True}),
    "down": ("ResBlock", (32, 24, 0.0), {"down": True}),
    "EDM": ("EDMBlock", (32, 32, 24), {"attention": True, "num_heads": 2}),
}
MODES = ("none", "selective", "full")
# Each block and each mode once in the interpreter, all together in ATen.
TOGETHER = [("aten", block, mode) for block in BLOCKS for mode in MODES]
TOGETHER += [("triton", block, mode) for block, mode in zip(BLOCKS, MODES, strict=True)]


@pytest.mark.parametrize(("backend", "kind", "mode"), TOGETHER, indirect=["backend"])
def test_gradients_of_each_sample_through_a_block(backend: None, kind: str, mode: str) -> None:
    name, args, options = BLOCKS[kind]
    block = getattr(reference, name)(*args, **options, use_checkpoint=mode == "full")
    fused = getattr(kernels, name)(*args, **options, checkpoint=mode)
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(0.1 * normal(*parameter.shape, seed=i))
    fused.load_state_dict(block.state_dict())
    inputs = normal(2, 1, 32, 4, 4, seed=20), normal(2, 1, 24, seed=21)

    def gradients(module: nn.Module) -> list[Tensor]:
        parameters = {k: v.detach() for k, v in module.named_parameters()}

        def objective(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
            return functional_call(module, parameters, sample).square().sum()

        return tree_leaves(vmap(grad(objective, (0, 1, 2)), (None, 0, 0))(parameters, *inputs))

    for one, other in zip(gradients(fused), gradients(block), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_plain_calls_take_the_cheaper_function() -> None:
    """Binding arguments by name costs as much host time as some launches."""
    leaf = x[0].clone().requires_grad_()
    assert type(ours(leaf)).__name__ == "Tensor"
    name = type(ours(leaf).grad_fn).__name__
    assert name in ("GroupNormSiLUFunctionBackward", "_DirectFunctionBackward")
