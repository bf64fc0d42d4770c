"""Where 16 bits are not enough: what is summed or kept in 32, and in which dtype it comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.oracle import NAMES, eager, error, gradients, problem
from support.running import Runner, run_operator
from torch import Tensor

from resblock_bench import kernels
from resblock_bench.kernels import norm_act_conv, prefer
from resblock_bench.kernels.aten import keep_mask
from resblock_bench.kernels.resample import Resample

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["aten", "triton"])
def run(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with prefer(request.param):
        yield run_operator


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradient_of_the_shift_before_the_norm_is_summed_in_32_bits(
    run: Runner, dtype: torch.dtype
) -> None:
    """It cancels to about zero over a group: of 16 bits little would remain."""
    p = problem(1, 8, 16, 16, groups=4, dtype=dtype, pre_shift=True, channels_last=True)
    p = replace(p, pre_shift=p.pre_shift.float())
    truth = gradients(eager, p.to(torch.float64))["pre_shift"]
    found = gradients(run, p)
    assert error(found["pre_shift"], truth) < 1e-5
    assert error(found["x"].double().sum((2, 3)), truth) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_have_the_dtype_of_their_parameter(run: Runner, dtype: torch.dtype) -> None:
    p = problem(2, 6, 4, 4, groups=2, pre_shift=True)
    dtypes: dict[str, Any] = dict.fromkeys(NAMES, dtype)
    for mixed in (dtypes, dtypes | {"weight": torch.float32, "shift": torch.float32}):
        found = gradients(run, replace(p, **{n: getattr(p, n).to(of) for n, of in mixed.items()}))
        assert {name: found[name].dtype for name in NAMES} == mixed
        assert found["x"].dtype == found["y"].dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_of_aten_depends_on_neither_layout_nor_dtype(p: float) -> None:
    like, seed = torch.empty(2, 6, 5, 7), torch.tensor(11)
    kept = keep_mask(seed, like, p) != 0
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, *HALF):
            mask = keep_mask(seed, like.to(dtype).contiguous(memory_format=layout), p)
            assert torch.equal(mask != 0, kept)
            assert mask.dtype == dtype and mask.is_contiguous(memory_format=layout)


def test_dropout_of_aten_depends_on_no_layout() -> None:
    outputs = []
    for channels_last in (False, True):
        p = problem(2, 6, 5, 7, groups=2, channels_last=channels_last)
        torch.manual_seed(4)
        outputs.append(run_operator(p, dropout_p=0.4))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_no_dropout_is_drawn_in_eval(autocast: bool, dtype: torch.dtype) -> None:
    """Of the selective form, in whatever dtype it writes the activation."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1).to(dtype)
    before, results = torch.get_rng_state(), []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for p in (0.0, 0.5):
            y = norm_act_conv(x, 2, None, None, conv, dropout_p=p, training=False)
            results.append((y, *torch.autograd.grad(y.float().sum(), x)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_in_eval_draw_nothing() -> None:
    for autocast in (False, True):
        for mode in ("none", "selective", "full"):
            block = kernels.ResBlock(32, 8, 0.5, checkpoint=mode).eval()
            x, emb = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 8)
            before = torch.get_rng_state()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                block(x, emb).float().sum().backward()
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("of", ["x", "weight", "scale", "conv.weight", "dy"])
def test_second_derivative_through_selective_raises(of: str) -> None:
    """Untied, it would silently be zero: a gradient penalty without effect."""
    x, dy = (torch.randn(2, 8, 4, 4, requires_grad=True) for _ in range(2))
    weight, scale = torch.randn(8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    out = norm_act_conv(x, 2, weight, None, conv, scale)
    (dx,) = torch.autograd.grad(out, x, dy, create_graph=True)
    leaf = {"x": x, "weight": weight, "scale": scale, "conv.weight": conv.weight, "dy": dy}[of]
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(dx.square().sum(), leaf)


@pytest.mark.parametrize("size", [(5, 8), (8, 5), (7, 4), (5, 9), (5,), (3, 5, 8), (2, 8, 7)])
def test_backward_of_pooling_pads_the_side_that_was_left_out(size: tuple[int, ...]) -> None:
    h = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    resample = Resample("down")
    out = resample.forward(h)
    g = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, h, g)
    torch.testing.assert_close(resample.backward(g, h.shape), expected)


@pytest.mark.parametrize("size", [(5, 8), (8, 5), (7, 5)])
@pytest.mark.parametrize("resample", ["up", "down"])
def test_selective_over_odd_sizes(resample: str, size: tuple[int, int]) -> None:
    conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, *size, requires_grad=True)
    y = Resample(resample).forward(kernels.group_norm_silu(x, 2))
    out = norm_act_conv(x, 2, None, None, conv, resample=resample)
    torch.testing.assert_close(out, conv(y))
    dy = torch.randn_like(out)
    found, expected = (torch.autograd.grad(o, x, dy)[0] for o in (out, conv(y)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("of_skip", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("of_h", [torch.float32, *HALF], ids=str)
def test_residual_addition_is_as_wide_as_the_wider(of_skip: torch.dtype, of_h: torch.dtype) -> None:
    pytest.importorskip("triton")
    from resblock_bench.kernels.op import residual_add

    skip, h, bias = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(8)
    skip, h = skip.to(of_skip), h.to(of_h)
    skip[0, 0, 0, 0], h[0, 0, 0, 0] = 1, 2.0**-7
    with prefer("triton"):
        y = residual_add(skip, h, bias)
    expected = skip.float() + h.float() + bias[:, None, None]
    assert y.dtype == torch.promote_types(of_skip, of_h)
    if y.dtype == torch.float32:
        assert torch.equal(y, expected)
    else:  # the interpreter does not round to bf16 as PyTorch does
        torch.testing.assert_close(y, expected.to(y.dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_embedding_and_bias_are_added_in_32_bits(dtype: torch.dtype) -> None:
    """What the second norm adds to its input before the statistics, in Triton."""
    pytest.importorskip("triton")
    from resblock_bench.kernels.launch import recording

    block = kernels.ResBlock(32, 8, 0.0).to(dtype)
    seen: list[Tensor] = []
    block.emb_layers.register_forward_hook(lambda module, args, out: seen.append(out))
    x, emb = torch.randn(2, 32, 4, 4, dtype=dtype), torch.randn(2, 8, dtype=dtype)
    with prefer("triton"), recording() as launches, torch.no_grad():
        block(x, emb)
    found = launches[1].arguments["p_pre"]
    assert found.dtype == torch.float32
    assert torch.equal(found, seen[0].float() + block.in_layers[2].bias.float())
