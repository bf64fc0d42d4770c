"""checkpoint.py against the faults of the checkpoint it replaces.

``naive_checkpoint`` re-tells how improved- and guided-diffusion checkpoint, in a few lines. Each
test first shows what that does, then what ours does: so a fault that PyTorch might one day mend
in the naive version shows up as a test to delete.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from resblock_bench.reference import ResBlock, checkpoint


class _Rerun(torch.autograd.Function):
    @staticmethod
    def forward(ctx, func, n, *tensors):
        ctx.func, ctx.inputs, ctx.params = func, tensors[:n], tensors[n:]
        with torch.no_grad():
            return func(*ctx.inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        leaves = [t.detach().requires_grad_(True) for t in ctx.inputs]
        with torch.enable_grad():
            outputs = ctx.func(*[t.view_as(t) for t in leaves])
        grads = torch.autograd.grad(outputs, [*leaves, *ctx.params], cotangents, allow_unused=True)
        del ctx.inputs, ctx.params
        return None, None, *grads


def naive_checkpoint(func, inputs, params, flag):
    if not flag:
        return func(*inputs)
    return _Rerun.apply(func, len(inputs), *inputs, *params)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_naive_and_ours_agree_with_plain_autograd_where_nothing_is_special():
    layer, x = nn.Linear(4, 3), leaf(2, 4)
    params = tuple(layer.parameters())
    func = lambda x: layer(x).tanh()  # noqa: E731
    results = [
        torch.autograd.grad(run(func, (x,), params, flag).square().sum(), [x, *params])
        for run, flag in [(checkpoint, False), (checkpoint, True), (naive_checkpoint, True)]
    ]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_flag_decides_whether_the_function_is_run_again():
    calls = []
    func = lambda x: calls.append(1) or x.sin()  # noqa: E731
    checkpoint(func, (leaf(2),), (), False).sum().backward()
    assert len(calls) == 1
    checkpoint(func, (leaf(2),), (), True).sum().backward()
    assert len(calls) == 3


def test_without_gradients_the_function_runs_once():
    calls = []
    x = leaf(2)
    with torch.no_grad():
        y = checkpoint(lambda x: calls.append(1) or x.sin(), (x,), (), True)
    assert len(calls) == 1
    assert not y.requires_grad
    torch.testing.assert_close(y, x.sin())


def test_params_need_not_be_an_exhausted_or_even_a_true_list():
    layer = nn.Linear(2, 2)
    y = checkpoint(layer, (leaf(1, 2),), iter(layer.parameters()), True)
    y.sum().backward()
    assert layer.weight.grad is not None


# --- random state (guided-diffusion#167) ---------------------------------------------------------


def test_dropout_gradients_belong_to_the_mask_of_the_forward():
    x = leaf(1000)
    drop = lambda x: F.dropout(x, 0.5)  # noqa: E731

    def outputs_and_gradients(run):
        y = run(drop, (x,), (), True)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return (y / x).detach(), grad  # of dropout both are mask / (1 − p)

    in_forward, in_backward = outputs_and_gradients(naive_checkpoint)
    assert (in_forward - in_backward).abs().max() == 2  # another mask
    in_forward, in_backward = outputs_and_gradients(checkpoint)
    torch.testing.assert_close(in_backward, in_forward)


def test_the_recomputation_leaves_the_random_stream_alone():
    drop = lambda x: F.dropout(x, 0.5)  # noqa: E731

    def state_moves(run):
        y = run(drop, (leaf(10),), (), True).sum()
        before = torch.get_rng_state()
        y.backward()
        return not torch.equal(before, torch.get_rng_state())

    assert state_moves(naive_checkpoint)
    assert not state_moves(checkpoint)


def test_resblock_with_dropout_has_the_gradients_of_the_plain_block(randomise):
    results = []
    for use_checkpoint in (False, True):
        block = ResBlock(32, 8, 0.3, use_checkpoint=use_checkpoint)
        randomise(block)
        x = torch.linspace(-2, 2, 2 * 32 * 16).reshape(2, 32, 4, 4).requires_grad_()
        torch.manual_seed(5)
        y = block(x, torch.ones(2, 8))
        torch.rand(7)  # the stream moves on between the forward and the backward
        results.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    torch.testing.assert_close(results[1], results[0])


# --- autocast ------------------------------------------------------------------------------------


def test_the_recomputation_runs_under_the_autocast_of_the_forward():
    layer = nn.Linear(16, 16)

    def dtypes(run):
        seen = []

        def func(x):
            y = layer(x)
            seen.append(y.dtype)
            return y.exp()  # its result is saved: the recomputation runs to here

        x = leaf(4, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(func, (x,), tuple(layer.parameters()), True)
        y.float().sum().backward()
        return seen

    assert dtypes(naive_checkpoint) == [torch.bfloat16, torch.float32]
    assert dtypes(checkpoint) == [torch.bfloat16, torch.bfloat16]


def test_resblock_under_autocast_has_the_gradients_of_the_plain_block(randomise):
    results = []
    for use_checkpoint in (False, True):
        block = ResBlock(32, 8, 0.0, use_scale_shift_norm=True, use_checkpoint=use_checkpoint)
        randomise(block)
        x = torch.linspace(-2, 2, 2 * 32 * 16).reshape(2, 32, 4, 4).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x, torch.ones(2, 8))
        results.append(torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()]))
    torch.testing.assert_close(results[1], results[0])


# --- what may be a parameter ---------------------------------------------------------------------


def test_a_frozen_parameter_is_no_error():
    def gradients(run):
        layer = nn.Linear(3, 3)
        layer.weight.requires_grad_(False)
        x = leaf(2, 3)
        run(layer, (x,), tuple(layer.parameters()), True).sum().backward()
        return layer.weight, layer.bias.grad, x.grad

    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(naive_checkpoint)
    weight, bias_grad, x_grad = gradients(checkpoint)
    assert weight.grad is None
    torch.testing.assert_close(bias_grad, torch.full((3,), 2.0))
    torch.testing.assert_close(x_grad, weight.sum(0).expand(2, 3))


def test_a_parameter_that_is_used_but_not_passed_gets_its_gradient():
    def gradient(run):
        layer = nn.Linear(3, 1)
        x = torch.arange(3.0).reshape(1, 3).requires_grad_()
        run(layer, (x,), (layer.bias,), True).sum().backward()
        return layer.weight.grad

    assert gradient(naive_checkpoint) is None
    torch.testing.assert_close(gradient(checkpoint), torch.arange(3.0).reshape(1, 3))


def test_parameters_get_gradients_when_no_input_needs_one():
    layer = nn.Linear(3, 1)
    checkpoint(layer, (torch.ones(1, 3),), (), True).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(1, 3))


# --- more than one backward ----------------------------------------------------------------------


def test_a_second_backward_through_a_retained_graph_works():
    def two_gradients(run):
        x = leaf(5)
        torch.manual_seed(0)
        y = run(lambda x: F.dropout(x.sin(), 0.5), (x,), (), True).sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        (second,) = torch.autograd.grad(y, x)
        return first, second

    with pytest.raises(AttributeError, match="inputs"):
        two_gradients(naive_checkpoint)
    first, second = two_gradients(checkpoint)
    assert first.any()
    torch.testing.assert_close(second, first)


def test_double_backward_counts_what_is_inside():
    """y = x³ inside and x² outside: d²/dx² is 6x + 2, of which the naive version sees the 2."""

    def second_derivative(run):
        x = torch.tensor(3.0, requires_grad=True)
        y = run(lambda x: x**3, (x,), (), True) + x**2
        (dy,) = torch.autograd.grad(y, x, create_graph=True)
        assert dy.item() == 3 * 9 + 2 * 3
        (d2y,) = torch.autograd.grad(dy, x)
        return d2y.item()

    assert second_derivative(naive_checkpoint) == 2  # silently
    assert second_derivative(checkpoint) == 6 * 3 + 2


def test_resblock_gradient_penalty_has_the_gradients_of_the_plain_block(randomise):
    results = []
    for use_checkpoint in (False, True):
        block = ResBlock(32, 8, 0.0, use_scale_shift_norm=True, use_checkpoint=use_checkpoint)
        randomise(block.double())
        x = torch.linspace(-2, 2, 32 * 4, dtype=torch.float64).reshape(1, 32, 2, 2)
        x.requires_grad_()
        y = block(x, torch.ones(1, 8, dtype=torch.float64))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        weights = [block.in_layers[2].weight, block.emb_layers[1].weight]
        results.append(torch.autograd.grad(dx.square().sum(), weights))
    assert results[0][0].any()
    torch.testing.assert_close(results[1], results[0])


# --- what may be an input ------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, 3, "mean", (1, 2)], ids=repr)
def test_inputs_need_not_be_tensors(extra):
    seen = []

    def func(x, extra):
        seen.append(extra)
        return x.exp()

    x = leaf(2)
    with pytest.raises(AttributeError, match="detach"):
        naive_checkpoint(func, (x, extra), (), True).sum().backward()
    seen.clear()
    checkpoint(func, (x, extra), (), True).sum().backward()
    assert seen == [extra, extra]  # in the recomputation too
    torch.testing.assert_close(x.grad, x.detach().exp())


def test_integer_tensors_may_be_inputs():
    index = torch.tensor([2, 0])
    x = leaf(3)
    with pytest.raises(RuntimeError, match="floating point"):
        naive_checkpoint(torch.take, (x, index), (), True).sum().backward()
    checkpoint(torch.take, (x, index), (), True).sum().backward()
    assert x.grad.tolist() == [1, 0, 1]


def test_keyword_inputs():
    def func(x, *, scale, power=1):
        return scale * x**power

    x, scale = leaf(3), leaf(3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        naive_checkpoint(func, (x,), (), True, scale=scale)
    for flag in (False, True):
        y = checkpoint(func, (x,), (), flag, scale=scale, power=2).sum()
        dx, dscale = torch.autograd.grad(y, [x, scale])
        torch.testing.assert_close(dx, (2 * scale * x).detach())
        torch.testing.assert_close(dscale, x.detach() ** 2)


def test_keywords_that_pytorchs_checkpoint_would_take_for_itself_reach_the_function():
    seen = {}

    def func(x, **kwargs):
        seen.update(kwargs)
        return x.sin()

    options = {"preserve_rng_state": 1, "debug": 2, "use_reentrant": 3, "determinism_check": "no"}
    checkpoint(func, (leaf(2),), (), True, **options).sum().backward()
    assert seen == options


# --- how inputs are kept -------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_changing_an_input_in_place_before_the_backward_is_an_error(keyword):
    def gradient(run):
        leaf = torch.tensor(1.0, requires_grad=True)
        x = leaf * 1
        if keyword:
            y = run(lambda *, x: x.sin(), (), (), True, x=x)
        else:
            y = run(lambda x: x.sin(), (x,), (), True)
        x.mul_(2)
        y.backward()
        return leaf.grad

    if not keyword:
        # The derivative at the changed input: wrong, and silent.
        torch.testing.assert_close(gradient(naive_checkpoint), torch.tensor(2.0).cos())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(checkpoint)


def saved(run, *args, **kwargs):
    """The shapes of what run(*args, **kwargs) keeps for its backward.

    Without the empty tensor that PyTorch's checkpoint keeps up to 2.11, for reasons of its own.
    """
    shapes = []
    with saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        run(*args, **kwargs)
    return [shape for shape in shapes if shape != (0,)]


def test_saved_tensors_hooks_see_the_inputs():
    x, y = leaf(3, 4), leaf(5)
    func = lambda x, y: x.sin().sum() * y.cos()  # noqa: E731
    assert saved(naive_checkpoint, func, (x, y), (), True) == []
    assert saved(checkpoint, func, (x, y), (), True) == [(3, 4), (5,)]
    assert saved(checkpoint, func, (x,), (), True, y=y) == [(3, 4), (5,)]


def test_offloaded_inputs_come_back():
    """Hooks may replace what is kept; the recomputation uses what they return."""
    x = leaf(3)
    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        y = checkpoint(torch.sin, (x,), (), True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())


def test_a_checkpointed_resblock_keeps_its_two_inputs_only():
    block = ResBlock(32, 8, 0.1, out_channels=64, use_checkpoint=True)
    x, emb = leaf(2, 32, 4, 4), leaf(2, 8)
    assert saved(block, x, emb) == [(2, 32, 4, 4), (2, 8)]
