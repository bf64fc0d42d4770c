"""layers.py: each part against its formula."""

import pytest
import torch
from torch import nn

from resblock_bench.reference import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


def test_silu_is_x_times_sigmoid(oracle):
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(SiLU()(x), oracle.silu(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_nd_gives_the_convolution_of_that_many_dimensions(dims):
    conv = conv_nd(dims, 4, 6, 3, padding=1, stride=2)
    assert type(conv) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    assert conv.weight.shape == (6, 4, *[3] * dims)
    assert conv.stride == (2,) * dims


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_avg_pool_nd_averages_over_that_many_dimensions(dims):
    x = torch.arange(4.0**dims).reshape(1, 1, *[4] * dims)
    pooled = avg_pool_nd(dims, kernel_size=4, stride=4)(x)
    assert pooled.shape == (1, 1, *[1] * dims)
    assert pooled.item() == (4.0**dims - 1) / 2


@pytest.mark.parametrize("make", [conv_nd, avg_pool_nd], ids=["conv_nd", "avg_pool_nd"])
@pytest.mark.parametrize("dims", [0, 4, None], ids=repr)
def test_other_dims_are_refused(make, dims):
    with pytest.raises(ValueError, match=rf"dims must be 1, 2 or 3, got {dims}"):
        make(dims, 3, 3, 3)


def test_linear_is_nn_linear():
    layer = linear(3, 5, bias=False)
    assert type(layer) is nn.Linear
    assert (layer.in_features, layer.out_features, layer.bias) == (3, 5, None)


def test_zero_module_zeroes_every_parameter_and_returns_the_same_module():
    module = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    assert zero_module(module) is module
    assert len(list(module.parameters())) == 4
    for p in module.parameters():
        assert p.requires_grad
        assert p.is_leaf
        assert not p.any()


# Groups of 2 and 3 channels, one to three spatial dimensions, and none (the classifier's pool).
@pytest.mark.parametrize("shape", [(2, 64, 5), (2, 96, 4, 3), (1, 64, 2, 3, 2), (3, 2048)], ids=str)
def test_normalization_is_group_norm_of_32_groups(oracle, randomise, shape):
    norm = randomise(normalization(shape[1])).double()
    x = 3 + 2 * torch.randn(shape, dtype=torch.float64)
    expected = oracle.group_norm(x, 32, norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(x), expected)


def test_epsilon_is_1e_5(oracle):
    norm = normalization(32).double()
    x = 1e-3 * torch.randn(1, 32, 8, dtype=torch.float64)  # a variance of 1e-6, below eps
    torch.testing.assert_close(
        norm(x), oracle.group_norm(x, 32, norm.weight, norm.bias, 1e-5), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("channels", [48, 16, 0, -32])
def test_channels_that_32_groups_do_not_divide_are_refused(channels):
    with pytest.raises(ValueError, match=rf"normalization\({channels}\).*32 equal groups"):
        normalization(channels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_input_is_normed_in_float32_and_returned_in_its_dtype(oracle, randomise, dtype):
    """With a mean of 100 standard deviations, 16-bit statistics would leave nothing right."""
    norm = randomise(GroupNorm32(4, 8))
    x = (100 + torch.randint(-2, 3, (2, 8, 6, 6)) / 2).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    assert norm.weight.dtype == norm.bias.dtype == torch.float32
    expected = oracle.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-5)
    # Nothing but the last rounding may be lost, and what float32 has not of a mean of 100.
    torch.testing.assert_close(y.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=5e-5)


def test_float64_input_keeps_its_precision(oracle):
    norm = GroupNorm32(2, 4)  # float32 weights: 1 and 0, exact
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    torch.testing.assert_close(
        norm(x), oracle.group_norm(x, 2, one, zero, 1e-5), rtol=1e-12, atol=1e-12
    )


def test_group_norm_32_without_affine(oracle):
    norm = GroupNorm32(2, 4, affine=False)
    x = torch.randn(2, 4, 9)
    expected = oracle.group_norm(x, 2, torch.ones(4), torch.zeros(4), 1e-5)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dim", [2, 7, 128])
@pytest.mark.parametrize("max_period", [10000, 50.0])
@pytest.mark.parametrize(
    "t",
    [torch.tensor([0, 1, 999, 4000]), torch.tensor([0.25, 12.75, -3.5])],
    ids=["integer", "fractional"],
)
def test_timestep_embedding_is_cosines_then_sines(oracle, dim, max_period, t):
    got = timestep_embedding(t, dim, max_period)
    assert got.dtype == torch.float32
    # float32 angles up to 4000 carry an error of 4000 · 2⁻²⁴ and that of the frequency.
    torch.testing.assert_close(
        got.double(), oracle.sinusoids(t, dim, max_period), rtol=0, atol=1e-3
    )


def test_timestep_embedding_at_small_times_is_exact_to_float32(oracle):
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(
        timestep_embedding(t, 9).double(), oracle.sinusoids(t, 9), rtol=0, atol=2e-7
    )


@pytest.mark.parametrize(
    ("t", "dim", "message"),
    [
        (torch.zeros(()), 8, r"shape \(N,\), got \(\)"),
        (torch.zeros(2, 1), 8, r"shape \(N,\), got \(2, 1\)"),
        (torch.zeros(2), 1, "at least 2, got 1"),
    ],
    ids=["scalar", "matrix", "dim"],
)
def test_timestep_embedding_refuses_other_arguments(t, dim, message):
    with pytest.raises(ValueError, match=message):
        timestep_embedding(t, dim)
