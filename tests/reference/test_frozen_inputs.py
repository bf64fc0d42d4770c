"""Inputs that want no gradient, in channels-last: PyTorch's own group norm ends the process there.

In processes of their own, since a crash would take the other tests along.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from resblock_bench import reference

NHWC = torch.channels_last

START = """
import torch
from resblock_bench import reference
NHWC = torch.channels_last
x, emb = torch.randn(2, 32, 8, 8).contiguous(memory_format=NHWC), torch.randn(2, 8)
"""
CASES = {
    "a block": "reference.ResBlock(32, 8, 0.0).to(memory_format=NHWC)(x, emb)",
    "a block of volumes": (
        "reference.ResBlock(32, 8, 0.0, dims=3)("
        "torch.randn(2, 32, 2, 8, 8).contiguous(memory_format=torch.channels_last_3d), emb)"
    ),
    "a slice": (
        "reference.ResBlock(32, 8, 0.0)"
        "(torch.cat([x, x], dim=1).contiguous(memory_format=NHWC)[:, :32], emb)"
    ),
    "EDM's block": "reference.EDMBlock(32, 32, 8)(x, emb)",
    "a checkpoint": "reference.ResBlock(32, 8, 0.0, use_checkpoint=True)(x, emb)",
    "compiled": "torch.compile(reference.GroupNorm32(8, 32), backend='aot_eager')(x)",
}
FROZEN = """
model = reference.UNetModel(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2)).to(memory_format=NHWC)
model.input_blocks.requires_grad_(False)
x = torch.randn(2, 3, 8, 8).contiguous(memory_format=NHWC)
y = model(x, torch.ones(2))
"""


@pytest.mark.slow
def test_no_process_ends() -> None:
    """All in one, which ends at the first that crashes and has printed those before."""
    lines = [START]
    for name, made in CASES.items():
        lines += [f"({made}).sum().backward()", f"print({name!r}, flush=True)"]
    lines += [FROZEN, "y.sum().backward()", "print('a frozen encoder')"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines() == [*CASES, "a frozen encoder"], done.stderr[-2000:]
    assert done.returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [reference.GroupNorm, reference.GroupNorm32])
def test_output_and_gradients_are_those_of_an_input_with_a_gradient(
    make: type[torch.nn.GroupNorm], dtype: torch.dtype
) -> None:
    norm, x = make(8, 32), torch.randn(2, 32, 6, 6).contiguous(memory_format=NHWC).to(dtype)
    results = []
    for wanted in (False, True):
        y = norm(x.clone().requires_grad_(wanted))
        assert y.is_contiguous(memory_format=NHWC) and y.dtype == dtype
        norm.zero_grad()
        y.float().square().sum().backward()
        results.append((y.detach(), norm.weight.grad, norm.bias.grad))
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-3)


def test_under_vmap() -> None:
    block = reference.ResBlock(32, 8, 0.0)
    x = torch.randn(2, 2, 32, 4, 4).transpose(-1, -3).contiguous().transpose(-1, -3)
    emb, parameters = torch.randn(2, 2, 8), dict(block.named_parameters())

    def gradient(x: torch.Tensor, emb: torch.Tensor) -> dict[str, torch.Tensor]:
        def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(block, parameters, (x, emb)).square().sum()

        return torch.func.grad(loss)(parameters)

    found = torch.func.vmap(gradient)(x, emb)
    for i in range(2):
        for name, expected in gradient(x[i].contiguous(), emb[i]).items():
            torch.testing.assert_close(found[name][i], expected, rtol=1e-4, atol=1e-3)
