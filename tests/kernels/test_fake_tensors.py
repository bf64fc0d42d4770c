"""Fake tensors have the shapes, dtypes and strides that the real ones have, everywhere.

A compiler plans with the former and runs on the latter; where they differ it reads garbage or
copies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.oracle import NAMES, Problem, problem
from support.running import run_operator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench import kernels
from resblock_bench.kernels import norm_act_conv, prefer
from resblock_bench.kernels.dispatch import Backend

LAYOUTS = ("contiguous", "channels-last", "sliced", "transposed")
SHAPES = {
    "length": (2, 8, 5),
    "map": (2, 8, 4, 6),
    "odd map": (3, 8, 5, 3),
    "one row": (2, 8, 1, 6),
    "one position": (2, 8, 1, 1),
    "one sample": (1, 8, 4, 6),
    "volume": (2, 8, 2, 4, 6),
}


def laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels-last" and t.dim() > 3:
        return t.contiguous(
            memory_format=(torch.channels_last, torch.channels_last_3d)[t.dim() - 4]
        )
    if layout == "sliced":
        return torch.stack([t, t], dim=-1)[..., 0]
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return t.contiguous()


def kind(t: Tensor | None) -> Any:
    return None if t is None else (tuple(t.shape), t.stride(), t.dtype)


def step(make: Callable[..., Tensor], leaves: dict[str, Tensor], fake: bool) -> dict[str, Any]:
    """The kinds of the output and of the gradients."""
    mode = FakeTensorMode() if fake else None
    if mode is not None:
        leaves = {name: mode.from_tensor(t) for name, t in leaves.items()}
    with mode or nullcontext():
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        y = make(leaves)
        gradients = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    return {"y": kind(y), **dict(zip(leaves, map(kind, gradients), strict=True))}


def agree(make: Callable[..., Tensor], leaves: dict[str, Tensor]) -> None:
    found = step(make, leaves, fake=True)
    assert found == step(make, leaves, fake=False)


def operator(p: Problem, dropout_p: float) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    leaves = {n: getattr(p, n) for n in ("x", *NAMES) if getattr(p, n) is not None}
    return lambda leaves: run_operator(replace(p, **leaves), dropout_p), leaves


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_operator_in_aten(shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in (
            {"pre_shift": True},
            {"modulated": False},
            {"modulated": False, "affine": False, "activation": None},
            {"affine": False},
        ):
            p = problem(*shape, groups=2, dtype=dtype, **options)
            agree(*operator(replace(p, x=laid_out(p.x, layout)), dropout_p=0.0))
    agree(*operator(replace(p, x=laid_out(p.x, layout)), dropout_p=0.5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES["map"], SHAPES["one position"], SHAPES["volume"]])
def test_operator_in_triton(shape: tuple[int, ...], layout: str) -> None:
    """The parameters are fp32 beside a 16-bit x, and so are their gradients."""
    pytest.importorskip("triton")
    p = problem(*shape, groups=1, dtype=torch.bfloat16, pre_shift=True)
    with prefer("triton"):
        agree(*operator(replace(p, x=laid_out(p.x, layout)), dropout_p=0.5))


class Normed(nn.Module):
    def __init__(self, conv: nn.Module, resample: str | None) -> None:
        super().__init__()
        self.conv, self.resample = conv, resample

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return norm_act_conv(x, 2, None, None, self.conv, scale, shift, resample=self.resample)


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        (SHAPES["length"], "aten"),
        (SHAPES["odd map"], "aten"),
        (SHAPES["odd map"], "triton"),
        (SHAPES["volume"], "aten"),
    ],
)
def test_norm_act_conv(
    shape: tuple[int, ...], backend: Backend, layout: str, resample: str | None
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3](8, 6, 3, padding=1)
    normed = Normed(conv, resample)
    p = problem(*shape, groups=2)
    leaves = {"x": laid_out(p.x, layout), "scale": p.scale, "shift": p.shift}

    def make(leaves: dict[str, Tensor]) -> Tensor:
        parameters = {name: leaves[name] for name in ("conv.weight", "conv.bias")}
        inputs = tuple(leaves[name] for name in ("x", "scale", "shift"))
        return torch.func.functional_call(normed, parameters, inputs)

    with prefer(backend):
        agree(make, leaves | {name: p.detach() for name, p in normed.named_parameters()})


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_addition(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    pytest.importorskip("triton")
    from resblock_bench.kernels.op import residual_add

    for of_skip, of_h in (dtypes, dtypes[::-1]):
        leaves = {
            "skip": torch.randn(2, 8, 4, 6).to(of_skip),
            "h": laid_out(torch.randn(2, 8, 4, 6).to(of_h), layout),
            "bias": torch.randn(8),
        }
        with prefer("triton"):
            agree(lambda t: residual_add(t["skip"], t["h"], t["bias"], 0.5), leaves)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [{}, {"up": True}, {"down": True}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_blocks(layout: str, options: dict[str, bool], mode: str) -> None:
    x, emb = laid_out(torch.randn(2, 32, 4, 6), layout), torch.randn(2, 8)
    found = []
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            block = kernels.ResBlock(
                32, 8, 0.1, 64, use_scale_shift_norm=True, checkpoint=mode, **options
            )
            leaves = [torch.empty_strided(t.shape, t.stride()).normal_() for t in (x, emb)]
            for leaf in leaves:
                leaf.requires_grad_()
            y = block(*leaves)
            gradients = torch.autograd.grad(y.sum(), leaves)
        found.append([kind(t) for t in (y, *gradients)])
    assert found[0] == found[1]
