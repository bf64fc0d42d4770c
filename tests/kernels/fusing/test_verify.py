"""fuse_(verify=True): each fused module against a float64 copy of what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import edm_classes as edm
from support import openai_classes as openai
from support.parity import drawn, randomised
from torch import Tensor, nn
from torch.nn.utils import prune

from resblock_bench import reference
from resblock_bench.kernels import fuse_, group_norm_silu
from resblock_bench.kernels.fusing import sequential
from resblock_bench.kernels.fusing.openai import FusedOpenAIBlock


def in_16_bits(model: nn.Module) -> nn.Module:
    """As OpenAI's models: the convolutions alone."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    return model


MODELS: dict[str, Any] = {
    "own": lambda: reference.UNetModel(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2)),
    "own, on an image of one dimension": lambda: reference.ResBlock(32, 8, 0.0, dims=1),
    "own, EDM": lambda: reference.EDMBlock(32, 32, 24, attention=True, num_heads=2),
    "own, pooled": lambda: reference.EncoderUNetModel(
        8, 3, 32, 10, 1, (2,), channel_mult=(1, 2), pool="spatial_v2"
    ),
    "OpenAI's": lambda: openai.UNet(dropout=0.3),
    "EDM's": edm.Network,
    "frozen": lambda: openai.ResBlock(32, 16, 0.0, use_checkpoint=True).requires_grad_(False),
    "16 bits": lambda: in_16_bits(openai.ResBlock(32, 16, 0.0)),
}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_right_is_kept(name: str, mode: str) -> None:
    model = randomised(MODELS[name]())
    before = {n: p.clone() for n, p in model.named_parameters()}
    training = [m.training for m in model.modules()]
    state, wants = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    report = fuse_(model, mode, verify=True)
    assert report.fused and not report.left
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_no_device_s_random_state_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds every device's generator, and a CUDA one's is not given back."""

    class Untried(openai.ResBlock):
        """A class is tried once."""

    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("all devices were seeded"))
    assert fuse_(Untried(32, 16, 0.0), verify=True).fused


def test_a_gradient_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shift that is zero the output does not show that it is left out."""
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    monkeypatch.setattr(sequential, "normalise", without_shift)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(model, verify=True)
    assert "the gradient of 0.bias is missing" in report.left[""]


def without_shift(norm: Any, x: Tensor, **arguments: Any) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, None)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda y: 2 * y, "the output"),
        (lambda y: y.detach(), "the gradient of "),
        (lambda y: y[..., :-1], "RuntimeError"),
    ],
    ids=["output", "gradient", "raises"],
)
def test_what_is_wrong_is_put_back_and_reported(wrong: Any, what: str, monkeypatch: Any) -> None:
    right = FusedOpenAIBlock._skip
    monkeypatch.setattr(FusedOpenAIBlock, "_skip", lambda self, x: wrong(right(self, x)))
    model = randomised(openai.UNet())
    x, emb = drawn((1, 3, 8, 8), (1, 32))
    expected = model(x, emb)
    report = fuse_(model, verify=True)
    blocks = [n for n, m in model.named_modules() if isinstance(m, openai.ResBlock)]
    assert set(blocks) <= set(report.left)
    assert all(f"verified and found wrong: {what}" in report.left[n] for n in blocks)
    assert all(type(m) is openai.ResBlock for m in model.modules() if hasattr(m, "h_upd"))
    torch.testing.assert_close(model(x, emb), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_run_is_left_and_says_why() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2:] != (5, 7):
                raise RuntimeError("an image is 5 by 7")
            return x

    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), Picky())
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(model, verify=True)
    assert "it cannot be verified: RuntimeError: an image is 5 by 7" in report.left[""]
    assert type(model) is nn.Sequential


@pytest.mark.parametrize(
    "compute",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: nn.utils.spectral_norm(conv),
        lambda conv: nn.utils.parametrizations.weight_norm(conv),
    ],
)
def test_weights_that_are_computed_before_every_forward_are_verified(compute: Any) -> None:
    block = randomised(openai.ResBlock(32, 16, 0.0))
    compute(block.in_layers[2])
    compute(block.emb_layers[1])
    block(*drawn((2, 32, 4, 4), (2, 16)))
    report = fuse_(block, verify=True)
    assert report.fused and not report.left


def test_a_block_that_no_input_can_be_drawn_for_is_left() -> None:
    block = openai.ResBlock(32, 16, 0.0)
    block.emb_layers[1] = nn.Flatten()
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(block, verify=True)
    assert "Sequential does not say how many features it reads" in report.left[""]
    assert type(block) is openai.ResBlock


def test_in_inference_mode_it_is_verified_all_the_same() -> None:
    block = randomised(openai.ResBlock(32, 16, 0.0))
    with torch.inference_mode():
        assert fuse_(block, verify=True).fused


def test_weights_that_are_not_there_cannot_be_verified() -> None:
    with torch.device("meta"):
        model = openai.ResBlock(32, 16, 0.0)
    with pytest.raises(ValueError, match="verify=True needs real weights"):
        fuse_(model, verify=True)
    assert type(model) is openai.ResBlock
    assert fuse_(model).fused


def test_verify_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="verify must be True or False"):
        fuse_(nn.Identity(), verify="yes")  # type: ignore[arg-type]
