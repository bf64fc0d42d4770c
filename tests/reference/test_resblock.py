"""ResBlock against the formula of its docstring, in float64, in every option."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resblock_bench.reference import ResBlock, TimestepBlock

SIZES = {1: (8,), 2: (4, 6), 3: (2, 4, 2)}
E = 24
# id -> out_channels, use_conv: 64 channels in, 96 out are 2 and 3 channels a group
SKIPS = {"identity": (None, False), "1x1": (96, False), "3x3": (96, True)}


def leaves(block, dims):
    x = torch.randn(2, 64, *SIZES[dims], dtype=torch.float64, requires_grad=True)
    emb = torch.randn(2, E, dtype=torch.float64, requires_grad=True)
    return x, emb


def output_and_gradients(f, x, emb, parameters):
    y = f(x, emb)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, torch.autograd.grad(y, [x, emb, *parameters], cotangent)


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(
    ("dims", "scale_shift", "how", "skip"),
    [
        pytest.param(dims, mode == "scale_shift", how, skip, id=f"{dims}d-{mode}-{how}-{skip}")
        for dims, mode, how, skip in product(
            (1, 2, 3), ("scale_shift", "add"), (None, "up", "down"), SKIPS
        )
    ],
)
def test_block_is_its_formula(oracle, randomise, dims, scale_shift, how, skip, use_checkpoint):
    out_channels, use_conv = SKIPS[skip]
    block = ResBlock(
        64,
        E,
        0.0,
        out_channels=out_channels,
        use_conv=use_conv,
        use_scale_shift_norm=scale_shift,
        dims=dims,
        use_checkpoint=use_checkpoint,
        up=how == "up",
        down=how == "down",
    ).double()
    randomise(block)
    x, emb = leaves(block, dims)
    weights = dict(block.named_parameters())

    def formula(x, emb):
        return oracle.resblock(weights, x, emb, scale_shift, how)

    y, gradients = output_and_gradients(block, x, emb, weights.values())
    y_, gradients_ = output_and_gradients(formula, x, emb, weights.values())
    torch.testing.assert_close(y, y_)
    for name, got, expected in zip(["x", "emb", *weights], gradients, gradients_, strict=True):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale_shift", "add"])
def test_dropout_stands_between_the_activation_and_the_last_convolution(
    oracle, randomise, scale_shift
):
    block = ResBlock(32, E, 0.4, use_scale_shift_norm=scale_shift).double()
    randomise(block)
    x, emb = torch.randn(2, 32, 4, 4).double(), torch.randn(2, E).double()
    weights = dict(block.named_parameters())
    torch.manual_seed(3)
    y = block(x, emb)
    torch.manual_seed(3)
    drop = lambda h: F.dropout(h, 0.4)  # noqa: E731
    torch.testing.assert_close(y, oracle.resblock(weights, x, emb, scale_shift, drop=drop))
    torch.testing.assert_close(block.eval()(x, emb), oracle.resblock(weights, x, emb, scale_shift))


@pytest.mark.parametrize("how", [None, "up", "down"], ids=str)
@pytest.mark.parametrize("out_channels", [32, 64])
def test_a_fresh_block_is_its_skip_path(oracle, how, out_channels):
    block = ResBlock(
        32, E, 0.1, out_channels=out_channels, up=how == "up", down=how == "down"
    ).double()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    expected = oracle.resample(x, how)
    if out_channels == 64:
        skip = block.skip_connection
        expected = oracle.conv(expected, skip.weight, skip.bias)
    torch.testing.assert_close(block(x, torch.randn(2, E).double()), expected)


def test_attributes_of_the_original():
    block = ResBlock(32, E, 0.1, out_channels=64, use_conv=True, use_checkpoint=True)
    assert isinstance(block, TimestepBlock)
    assert (block.channels, block.emb_channels, block.out_channels) == (32, E, 64)
    assert block.dropout == 0.1
    assert (block.use_conv, block.use_checkpoint, block.updown) == (True, True, False)
    assert block.use_scale_shift_norm is False
    assert type(block.h_upd) is type(block.x_upd) is nn.Identity
    assert block.out_layers[2].p == 0.1
    assert ResBlock(32, E, 0.0, up=True).updown is True
    assert ResBlock(32, E, 0.0, down=True).updown is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale_shift", "add"])
def test_16_bit_convolutions_with_a_float32_embedding(randomise, dtype, scale_shift):
    """The embedding's Linear computes in float32 and is cast to h's dtype."""
    block = ResBlock(32, E, 0.0, out_channels=64, use_scale_shift_norm=scale_shift)
    randomise(block)
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, E)
    expected = block(x, emb)
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            m.to(dtype)
    y = block(x.to(dtype), emb)
    assert y.dtype == dtype
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up": True, "down": True}, "up and down are both True"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"dims": 4}, "dims must be 1, 2 or 3, got 4"),
        ({"channels": 40}, r"normalization\(40\)"),
        ({"out_channels": 40}, r"normalization\(40\)"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResBlock(**({"channels": 32, "emb_channels": E, "dropout": 0.0} | options))


@pytest.mark.parametrize(
    ("x_shape", "emb_shape", "message"),
    [
        ((2, 64, 4, 4), (2, E), r"ResBlock: x has shape \(2, 64, 4, 4\).*64 channels.*for 32"),
        ((2, 32, 4, 4), (2, E + 1), rf"emb has shape \(2, {E + 1}\), but must be \(N, {E}\)"),
        ((2, 32, 4, 4), (E,), rf"emb has shape \({E},\), but must be \(N, {E}\)"),
    ],
    ids=["channels", "embedding width", "embedding dimensions"],
)
def test_wrong_inputs_are_refused(x_shape, emb_shape, message):
    block = ResBlock(32, E, 0.0)
    with pytest.raises(ValueError, match=message):
        block(torch.zeros(x_shape), torch.zeros(emb_shape))
