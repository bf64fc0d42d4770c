"""attention.py against softmax attention written out a head and a query at a time."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from resblock_bench.reference import AttentionBlock
from resblock_bench.reference.attention import AttentionPool, qkv_attention

LAYOUTS = {False: "heads, qkv, c", True: "qkv, heads, c"}
ORDERS = pytest.mark.parametrize("new_order", [False, True], ids=["legacy", "new"])


@ORDERS
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_qkv_attention_is_softmax_attention(oracle, heads, new_order):
    qkv = torch.randn(2, 3 * 8, 5, dtype=torch.float64)
    expected = oracle.multihead(qkv, heads, LAYOUTS[new_order])
    torch.testing.assert_close(qkv_attention(qkv, heads, new_order), expected)


def test_the_two_orders_differ_with_several_heads_and_agree_with_one():
    qkv = torch.randn(2, 3 * 8, 5)
    assert torch.equal(qkv_attention(qkv, 1, True), qkv_attention(qkv, 1, False))
    assert not torch.allclose(qkv_attention(qkv, 2, True), qkv_attention(qkv, 2, False))


@ORDERS
def test_float16_logits_are_scaled_before_the_product(oracle, new_order):
    """q·k of 64 channels of size 60 is 230 400, more than float16 holds; scaled first, 28 800."""
    q = 60 * torch.sign(torch.randn(1, 64, 4))
    qkv = torch.cat([q, q, torch.randn(1, 64, 4)], 1)  # k = q: the largest product there is
    half = qkv_attention(qkv.half(), 1, new_order)
    assert half.dtype == torch.float16
    expected = oracle.multihead(qkv.double(), 1, LAYOUTS[new_order])
    torch.testing.assert_close(half.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softmax_runs_in_float32(dtype):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "softmax" in str(func):
                seen.append(out.dtype)
            return out

    with Watch():
        qkv_attention(torch.randn(1, 12, 4, dtype=dtype), 1, False)
    assert seen == [torch.float32]


@ORDERS
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("sizes", [(6,), (2, 3), (2, 1, 3)], ids=["1d", "2d", "3d"])
def test_block_is_its_formula(oracle, randomise, sizes, use_checkpoint, new_order):
    block = AttentionBlock(
        64,
        num_head_channels=16,
        use_checkpoint=use_checkpoint,
        use_new_attention_order=new_order,
    ).double()
    randomise(block)
    x = torch.randn(2, 64, *sizes, dtype=torch.float64, requires_grad=True)
    weights = dict(block.named_parameters())
    y = block(x)
    expected = oracle.attention_block(weights, x, 4, new_order)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    inputs = [x, *weights.values()]
    got = torch.autograd.grad(y, inputs, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs, cotangent))


def test_a_fresh_block_is_the_identity():
    x = torch.randn(2, 32, 3, 3)
    assert torch.equal(AttentionBlock(32, num_heads=4)(x), x)


def test_the_checkpoint_flag_is_honoured(randomise):
    """guided-diffusion checkpoints attention whatever the flag says; here False means False."""

    def saved_shapes(use_checkpoint):
        block = randomise(AttentionBlock(32, use_checkpoint=use_checkpoint))
        shapes = []
        with saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            block(torch.randn(2, 32, 3, 3, requires_grad=True))
        return [shape for shape in shapes if shape != (0,)]  # PyTorch up to 2.11 keeps one of these

    attention_matrix = (2, 1, 9, 9)
    assert attention_matrix in saved_shapes(False)
    assert saved_shapes(True) == [(2, 32, 3, 3)]


def test_heads_by_number_and_by_width():
    assert AttentionBlock(64, num_heads=4).num_heads == 4
    assert AttentionBlock(64, num_heads=4, num_head_channels=32).num_heads == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_head_channels": 48}, "64 channels are not a whole number of heads.*=48"),
        ({"num_heads": 3}, "num_heads=3 must be positive and divide the 64 channels"),
        ({"num_heads": 0}, "num_heads=0 must be positive"),
    ],
    ids=["width", "number", "none"],
)
def test_heads_that_do_not_divide_the_channels_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionBlock(64, **options)


def test_wrong_number_of_rows_or_channels_is_refused():
    with pytest.raises(ValueError, match="20 rows are not 3 × 2 heads"):
        qkv_attention(torch.zeros(1, 20, 4), 2, False)
    with pytest.raises(ValueError, match=r"AttentionBlock: x has shape.*32 channels.*built for 64"):
        AttentionBlock(64)(torch.zeros(1, 32, 2, 2))


def test_attention_pool_reads_the_mean_token(oracle, randomise):
    pool = AttentionPool(tokens=6, channels=16, head_channels=8, out_channels=5).double()
    randomise(pool)
    w = dict(pool.named_parameters())
    x = torch.randn(2, 16, 2, 3, dtype=torch.float64)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.sum(2, keepdim=True) / 6, tokens], 2) + w["positional_embedding"]
    qkv = oracle.conv(tokens, w["qkv_proj.weight"], w["qkv_proj.bias"])
    out = oracle.multihead(qkv, 2, "qkv, heads, c")
    expected = oracle.conv(out, w["c_proj.weight"], w["c_proj.bias"])[:, :, 0]
    torch.testing.assert_close(pool(x), expected)


def test_attention_pool_refuses_what_it_was_not_built_for():
    pool = AttentionPool(tokens=6, channels=16, head_channels=8, out_channels=5)
    with pytest.raises(ValueError, match=r"9 positions.*built for 6; .*image_size"):
        pool(torch.zeros(1, 16, 3, 3))
    with pytest.raises(ValueError, match="16 channels are not a whole number of heads of 5"):
        AttentionPool(tokens=6, channels=16, head_channels=5, out_channels=5)
