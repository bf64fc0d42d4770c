"""Fusing this project's models in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resblock_bench import kernels, reference
from resblock_bench.kernels import fuse_
from resblock_bench.kernels.fusing.sequential import FusedSequential


def unet(**options: object) -> nn.Module:
    arguments = {
        "image_size": 8,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    return reference.UNetModel(**(arguments | options))


def randomised(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / p[0].numel() ** 0.5))
    return model


def edm(variant: str) -> nn.Module:
    return reference.EDMUNet(
        8,
        3,
        3,
        variant,
        model_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
    )


MODELS = {
    "scale-shift": lambda: unet(),
    "add": lambda: unet(use_scale_shift_norm=False, resblock_updown=False),
    "edm adm": lambda: edm("adm"),
    "edm ddpm++": lambda: edm("ddpmpp"),
}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_fused_model_computes_the_same(make: object, mode: str) -> None:
    model = randomised(make()).train()
    fused = copy.deepcopy(model)
    report = fuse_(fused, mode)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    model(x, t).square().mean().backward()
    fused(x, t).square().mean().backward()
    torch.testing.assert_close(fused(x, t), model(x, t), rtol=1e-4, atol=1e-5)
    for (name, p), (other, q) in zip(
        model.named_parameters(), fused.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert not report.left


def test_every_block_and_norm_of_a_published_model_is_fused() -> None:
    with torch.device("meta"):
        model = reference.build("adm-imagenet64-cond")
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    report = fuse_(model, "selective")
    blocks = [m for m in model.modules() if isinstance(m, reference.ResBlock)]
    assert len(blocks) == 36
    assert all(type(b) is kernels.ResBlock and b.checkpoint == "selective" for b in blocks)
    assert len(report.fused) == norms - 36  # two norms to a block
    assert str(report).startswith(f"fused {norms - 36}, left 0\n  input_blocks.1.0: ResBlock")


def test_parameters_and_identity_are_kept() -> None:
    model = unet()
    before = list(model.parameters())
    blocks = [m for m in model.modules() if isinstance(m, reference.ResBlock)]
    fuse_(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(type(b) is kernels.ResBlock for b in blocks)


def test_mode_is_left_as_it_was_unless_given() -> None:
    model = unet(use_checkpoint=True)
    fuse_(model)
    assert {b.checkpoint for b in model.modules() if isinstance(b, kernels.ResBlock)} == {"full"}
    report = fuse_(model, "selective")
    assert "was fused before" in str(report)
    assert {b.checkpoint for b in model.modules() if isinstance(b, kernels.ResBlock)} == {
        "selective"
    }


def test_a_block_alone_and_a_norm_in_a_sequence() -> None:
    block = reference.ResBlock(32, 8, 0.0)
    assert "(model): ResBlock" in str(fuse_(block))
    head = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3))
    x = torch.randn(2, 16, 4, 4)
    y, normalised = head(x), head[0](x)
    fuse_(head)
    assert isinstance(head, FusedSequential)
    torch.testing.assert_close(head(x), y)
    # A model may use the norm without what follows it.
    torch.testing.assert_close(head[0](x), normalised)


def test_head_of_a_unet_is_one() -> None:
    model = unet()
    report = fuse_(model)
    assert isinstance(model.out, FusedSequential)
    assert report.fused["out"] == "Sequential with 0: GroupNorm32 + SiLU in one"


def test_norm_subclass_is_left_and_reported() -> None:
    class Norm(nn.GroupNorm):
        pass

    model = nn.Sequential(Norm(2, 4), nn.GroupNorm(2, 4))
    assert fuse_(model).left == {"0": "Norm is a subclass"}


def test_pool_head_norm_of_vectors() -> None:
    model = reference.EncoderUNetModel(
        8, 3, 32, 10, 1, (2,), channel_mult=(1, 2), pool="spatial_v2"
    )
    randomised(model)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    y = model(x, t)
    fuse_(model)
    torch.testing.assert_close(model(x, t), y, rtol=1e-4, atol=1e-5)


def test_subclass_is_left_and_reported() -> None:
    class Special(reference.ResBlock):
        pass

    model = nn.ModuleDict({"a": Special(32, 8, 0.0), "b": reference.ResBlock(32, 8, 0.0)})
    report = fuse_(model)
    assert type(model["a"]) is Special and type(model["a"].in_layers[0]) is reference.GroupNorm32
    assert report.left == {"a": "Special is a subclass that may compute otherwise"}
    assert list(report.fused) == ["b"]


def test_nothing_to_fuse_says_so() -> None:
    with pytest.warns(UserWarning, match="fuse_ changed nothing: nothing to fuse"):
        report = fuse_(nn.Linear(2, 2))
    assert "nothing to fuse" in str(report)


def test_unknown_mode_changes_nothing() -> None:
    model = unet()
    with pytest.raises(ValueError, match="checkpoint is 'half'"):
        fuse_(model, "half")
    assert not any(isinstance(m, kernels.ResBlock) for m in model.modules())
