"""The names and shapes that released weights have: guided-diffusion's module tree, written out."""

import pytest
import torch

from resblock_bench.reference import AttentionBlock, EncoderUNetModel, ResBlock, UNetModel

E = 128  # four times the 32 model_channels of the networks below


def layer(name, *shape):
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def under(prefix, keys):
    return {f"{prefix}.{key}": shape for key, shape in keys.items()}


def res(c_in, c_out, wide):
    """A 2D ResBlock; `wide` is 2 with scale-shift norm, else 1."""
    keys = {
        **norm("in_layers.0", c_in),
        **layer("in_layers.2", c_out, c_in, 3, 3),
        **layer("emb_layers.1", wide * c_out, E),
        **norm("out_layers.0", c_out),
        **layer("out_layers.3", c_out, c_out, 3, 3),
    }
    if c_in != c_out:
        keys |= layer("skip_connection", c_out, c_in, 1, 1)
    return keys


def attn(c):
    return {
        **norm("norm", c),
        **layer("qkv", 3 * c, c, 1),
        **layer("proj_out", c, c, 1),
    }


def shapes(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale_shift", "add"])
@pytest.mark.parametrize("c_out", [32, 64])
def test_resblock(scale_shift, c_out):
    block = ResBlock(32, E, 0.1, out_channels=c_out, use_scale_shift_norm=scale_shift)
    assert shapes(block) == res(32, c_out, 2 if scale_shift else 1)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_resblock_with_a_convolved_skip(dims):
    block = ResBlock(32, E, 0.1, out_channels=64, use_conv=True, dims=dims, up=True)
    assert shapes(block) == {
        **norm("in_layers.0", 32),
        **layer("in_layers.2", 64, 32, *[3] * dims),
        **layer("emb_layers.1", 64, E),
        **norm("out_layers.0", 64),
        **layer("out_layers.3", 64, 64, *[3] * dims),
        **layer("skip_connection", 64, 32, *[3] * dims),
    }


def test_attention_block():
    assert shapes(AttentionBlock(64, num_heads=2)) == attn(64)


ENCODER = {
    **layer("time_embed.0", E, 32),
    **layer("time_embed.2", E, E),
    **layer("input_blocks.0.0", 32, 3, 3, 3),
    **under("input_blocks.1.0", res(32, 32, 2)),
    **under("input_blocks.3.0", res(32, 64, 2)),
    **under("input_blocks.3.1", attn(64)),
    **under("middle_block.0", res(64, 64, 2)),
    **under("middle_block.1", attn(64)),
    **under("middle_block.2", res(64, 64, 2)),
}
DECODER = {
    **under("output_blocks.0.0", res(128, 64, 2)),
    **under("output_blocks.0.1", attn(64)),
    **under("output_blocks.1.0", res(96, 64, 2)),
    **under("output_blocks.1.1", attn(64)),
    **under("output_blocks.2.0", res(96, 32, 2)),
    **under("output_blocks.3.0", res(64, 32, 2)),
    **norm("out.0", 32),
    **layer("out.2", 6, 32, 3, 3),
}
CONV_RESAMPLING = {
    **layer("input_blocks.2.0.op", 32, 32, 3, 3),
    **layer("output_blocks.1.2.conv", 64, 64, 3, 3),
}
RESBLOCK_RESAMPLING = {
    **under("input_blocks.2.0", res(32, 32, 2)),
    **under("output_blocks.1.2", res(64, 64, 2)),
}
SETTINGS = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
}


def test_unet_with_convolutions_between_levels():
    model = UNetModel(**SETTINGS, out_channels=6)
    assert shapes(model) == ENCODER | DECODER | CONV_RESAMPLING


def test_unet_with_resblocks_between_levels_and_classes():
    model = UNetModel(**SETTINGS, out_channels=6, resblock_updown=True, num_classes=10)
    expected = ENCODER | DECODER | RESBLOCK_RESAMPLING | {"label_emb.weight": (10, E)}
    assert shapes(model) == expected


@pytest.mark.parametrize(
    ("pool", "head"),
    [
        ("adaptive", {**norm("out.0", 64), **layer("out.3", 10, 64, 1, 1)}),
        (
            "attention",
            {
                **norm("out.0", 64),
                "out.2.positional_embedding": (64, 17),
                **layer("out.2.qkv_proj", 192, 64, 1),
                **layer("out.2.c_proj", 10, 64, 1),
            },
        ),
        # 32 + 32 + 32 + 64 of the input blocks and 64 of the middle
        ("spatial", {**layer("out.0", 2048, 224), **layer("out.2", 10, 2048)}),
        (
            "spatial_v2",
            {**layer("out.0", 2048, 224), **norm("out.1", 2048), **layer("out.3", 10, 2048)},
        ),
    ],
    ids=["adaptive", "attention", "spatial", "spatial_v2"],
)
def test_encoder(pool, head):
    model = EncoderUNetModel(**SETTINGS, out_channels=10, pool=pool, resblock_updown=True)
    down = {k: v for k, v in RESBLOCK_RESAMPLING.items() if k.startswith("input_blocks")}
    assert shapes(model) == ENCODER | down | head


def test_weights_load_strictly_and_into_float16_blocks():
    source = UNetModel(**SETTINGS, out_channels=6)
    target = UNetModel(**SETTINGS, out_channels=6, use_fp16=True)
    target.load_state_dict(source.state_dict(), strict=True)
    assert target.dtype == torch.float16
    torch.testing.assert_close(
        target.input_blocks[0][0].weight.float(),
        source.input_blocks[0][0].weight,
        rtol=1e-3,
        atol=1e-4,
    )
