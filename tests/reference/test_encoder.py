"""encoder.py: the four pools against their formulas, on top of a torso tested in test_unet.py."""

import pytest
import torch
from torch import nn

from resblock_bench.reference import EncoderUNetModel, UNetModel, timestep_embedding

SIZES = {1: (8,), 2: (8, 8), 3: (8, 8, 8)}
POOLS = ["adaptive", "attention", "spatial", "spatial_v2"]
TORSO = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
}


def maps_of_every_block(model, x, t):
    """By running the blocks one by one."""
    emb = model.time_embed(timestep_embedding(t, 32).to(x.dtype))
    maps = []
    for block in [*model.input_blocks, model.middle_block]:
        x = block(x, emb)
        maps.append(x)
    return maps


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pool_is_its_formula(oracle, randomise, pool, dims):
    model = EncoderUNetModel(**TORSO, out_channels=10, dims=dims, pool=pool).double()
    randomise(model)
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64)
    t = torch.tensor([3.0, 0.5])
    maps = maps_of_every_block(model, x, t)
    w = model.state_dict()
    if pool in ("adaptive", "attention"):
        normed = oracle.group_norm(maps[-1], 32, w["out.0.weight"], w["out.0.bias"], 1e-5)
        h = oracle.silu(normed).flatten(2)
        mean = h.sum(2, keepdim=True) / h.shape[2]
    if pool == "adaptive":
        expected = mean[:, :, 0] @ w["out.3.weight"].flatten(1).T + w["out.3.bias"]
    elif pool == "attention":
        tokens = torch.cat([mean, h], 2) + w["out.2.positional_embedding"]
        qkv = oracle.conv(tokens, w["out.2.qkv_proj.weight"], w["out.2.qkv_proj.bias"])
        out = oracle.multihead(qkv, 2, "qkv, heads, c")
        expected = oracle.conv(out, w["out.2.c_proj.weight"], w["out.2.c_proj.bias"])[:, :, 0]
    else:
        means = torch.cat([m.flatten(2).sum(2) / m[0, 0].numel() for m in maps], 1)
        h = means @ w["out.0.weight"].T + w["out.0.bias"]
        if pool == "spatial":
            h, last = h.clamp(min=0), "out.2"
        else:
            h = oracle.group_norm(h, 32, w["out.1.weight"], w["out.1.bias"], 1e-5)
            h, last = oracle.silu(h), "out.3"
        expected = h @ w[f"{last}.weight"].T + w[f"{last}.bias"]
    torch.testing.assert_close(model(x, t), expected)


def test_torso_is_the_unets_encoder_and_middle():
    encoder = EncoderUNetModel(**TORSO, out_channels=10, resblock_updown=True)
    unet = UNetModel(**TORSO, out_channels=6, resblock_updown=True)
    shared = {
        k: v.shape
        for k, v in unet.state_dict().items()
        if not k.startswith(("output_blocks.", "out."))
    }
    assert shared == {
        k: v.shape for k, v in encoder.state_dict().items() if not k.startswith("out.")
    }


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_has_a_gradient(randomise, pool):
    model = EncoderUNetModel(**TORSO, out_channels=10, pool=pool, use_checkpoint=True)
    randomise(model)
    model(torch.randn(2, 3, 8, 8), torch.tensor([1, 9])).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


@pytest.mark.parametrize("pool", POOLS)
def test_fp16_mode_casts_the_convolutions_of_the_blocks_only(randomise, pool):
    model = EncoderUNetModel(**TORSO, out_channels=10, pool=pool)
    randomise(model)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    expected = model(x, t)
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    for name, m in model.named_modules():
        is_conv = isinstance(m, nn.Conv1d | nn.Conv2d)
        dtype = torch.float16 if is_conv and not name.startswith("out.") else torch.float32
        assert all(p.dtype == dtype for p in m.parameters(recurse=False)), name
    got = model(x, t)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 1e-2
    model.convert_to_fp32()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_any_size_pools_but_for_attention():
    model = EncoderUNetModel(**TORSO, out_channels=10, pool="adaptive")
    assert model(torch.zeros(1, 3, 6, 9), torch.zeros(1)).shape == (1, 10)
    model = EncoderUNetModel(**TORSO, out_channels=10, pool="attention")
    with pytest.raises(ValueError, match="built for 16"):
        model(torch.zeros(1, 3, 4, 4), torch.zeros(1))


def test_impossible_pools_are_refused():
    with pytest.raises(ValueError, match=r"pool must be .* got 'max'"):
        EncoderUNetModel(**TORSO, out_channels=10, pool="max")
    with pytest.raises(ValueError, match='pool="attention" needs num_head_channels'):
        EncoderUNetModel(**(TORSO | {"num_head_channels": -1}), out_channels=10, pool="attention")


def test_a_fresh_adaptive_pool_gives_zero():
    model = EncoderUNetModel(**TORSO, out_channels=10, pool="adaptive")
    assert not model(torch.randn(2, 3, 8, 8), torch.tensor([1, 9])).any()
