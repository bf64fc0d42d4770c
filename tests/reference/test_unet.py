"""unet.py: the whole network against a walk over its state dict, its 16-bit mode, its errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resblock_bench.reference import SuperResModel, UNetModel

SIZES = {1: (8,), 2: (8, 4), 3: (2, 4, 4)}


def small(model=UNetModel, **options):
    settings = {
        "image_size": 8,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "num_heads": 2,
    }
    return model(**(settings | options))


def walk(oracle, w, x, t, y=None, *, heads, heads_up, scale_shift, updown, new_order=False):
    """The network as its state dict tells it: what each block is can be read from its keys."""
    emb = oracle.sinusoids(t, w["time_embed.0.weight"].shape[1])
    emb = oracle.silu(emb @ w["time_embed.0.weight"].T + w["time_embed.0.bias"])
    emb = emb @ w["time_embed.2.weight"].T + w["time_embed.2.bias"]
    if y is not None:
        emb = emb + w["label_emb.weight"][y]

    def run(prefix, h, heads, how=None):
        """All children of one block. A second ResBlock, or a lone one given `how`, resamples."""
        children = sorted({k.split(".")[0] for k in oracle.within(w, prefix)}, key=int)
        for i, child in enumerate(children):
            v = oracle.within(w, f"{prefix}{child}.")
            if "in_layers.0.weight" in v:
                resampling = how if i == len(children) - 1 else None
                h = oracle.resblock(v, h, emb, scale_shift, resampling)
            elif "qkv.weight" in v:
                h = oracle.attention_block(v, h, heads, new_order)
            elif "op.weight" in v:
                h = oracle.conv(h, v["op.weight"], v["op.bias"], stride=2)
            elif "conv.weight" in v:
                h = oracle.conv(oracle.resample(h, "up"), v["conv.weight"], v["conv.bias"])
            else:
                h = oracle.conv(h, v["weight"], v["bias"])
        return h

    skips = []
    for i in range(4):  # stem, level 0, down, level 1
        x = run(f"input_blocks.{i}.", x, heads, "down" if updown and i == 2 else None)
        skips.append(x)
    x = run("middle_block.", x, heads)
    for i in range(4):  # two at level 1 (the second resamples), two at level 0
        x = torch.cat([x, skips[3 - i]], 1)
        x = run(f"output_blocks.{i}.", x, heads_up, "up" if updown and i == 1 else None)
    x = oracle.silu(oracle.group_norm(x, 32, w["out.0.weight"], w["out.0.bias"], 1e-5))
    return oracle.conv(x, w["out.2.weight"], w["out.2.bias"])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("scale_shift", "updown", "classes"),
    [(True, True, 5), (False, False, None), (True, False, None), (False, True, 5)],
    ids=["scale_shift-updown-cond", "add-conv", "scale_shift-conv", "add-updown-cond"],
)
def test_the_network_is_what_its_state_dict_says(
    oracle, randomise, dims, scale_shift, updown, classes
):
    model = small(
        dims=dims,
        use_scale_shift_norm=scale_shift,
        resblock_updown=updown,
        num_classes=classes,
        num_heads_upsample=4,
        use_new_attention_order=updown,
    ).double()
    randomise(model)
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64)
    t = torch.tensor([3, 1.5])
    y = None if classes is None else torch.tensor([4, 0])
    expected = walk(
        oracle,
        model.state_dict(),
        x,
        t,
        y,
        heads=2,
        heads_up=4,
        scale_shift=scale_shift,
        updown=updown,
        new_order=updown,
    )
    # The sinusoids are computed in float32: 1e-5 is their error, carried through.
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_checkpointing_changes_no_gradient_and_every_parameter_has_one(randomise, dims):
    results = []
    x = torch.linspace(-1, 1, 2 * 3 * torch.Size(SIZES[dims]).numel()).reshape(2, 3, *SIZES[dims])
    for use_checkpoint in (False, True):
        model = small(dims=dims, use_checkpoint=use_checkpoint, dropout=0.2, num_classes=3)
        randomise(model)
        torch.manual_seed(0)
        model(x, torch.tensor([1, 9]), torch.tensor([0, 2])).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert grad is not None and grad.any(), name
    torch.testing.assert_close(results[1], results[0])


def test_a_fresh_network_gives_zero_and_still_learns():
    model = small()
    y = model(torch.randn(1, 3, 8, 8), torch.tensor([1]))
    assert not y.any()
    (y - 1).square().sum().backward()
    assert model.out[2].weight.grad.any()


def test_resampling_without_convolutions():
    model = small(conv_resample=False)
    assert isinstance(model.input_blocks[2][0].op, nn.AvgPool2d)
    assert not model.output_blocks[1][2].use_conv
    assert model(torch.randn(1, 3, 8, 8), torch.tensor([1])).shape == (1, 6, 8, 8)


def test_fractional_multipliers_round_down():
    model = small(model_channels=64, channel_mult=(0.5, 1.5), num_head_channels=32)
    assert model.input_blocks[0][0].out_channels == 32
    assert model.middle_block[0].channels == 96


FP32 = (nn.GroupNorm, nn.Linear, nn.Embedding)


def dtypes_by_rule(model):
    """The rule of the 16-bit mode, by name and class."""
    rule = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            rule[name] = torch.float32 if name.startswith("out.") else torch.float16
        elif isinstance(m, FP32):
            rule[name] = torch.float32
    return rule


@pytest.mark.parametrize("how", ["convert_to_fp16", "use_fp16"])
@pytest.mark.parametrize("updown", [False, True], ids=["conv", "updown"])
def test_fp16_mode_casts_the_convolutions_of_the_blocks_only(how, updown):
    model = small(num_classes=5, resblock_updown=updown, use_fp16=how == "use_fp16")
    if how == "convert_to_fp16":
        assert model.dtype == torch.float32
        model.convert_to_fp16()
    assert model.dtype == torch.float16
    rule = dtypes_by_rule(model)
    assert {"label_emb", "time_embed.0", "middle_block.1.qkv", "out.2"} <= rule.keys()
    for name, dtype in rule.items():
        for p in model.get_submodule(name).parameters():
            assert p.dtype == dtype, name
    model.convert_to_fp32()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.dtype == torch.float32


def test_fp16_mode_computes_the_same_network(randomise):
    model = small(num_classes=5, use_scale_shift_norm=True, resblock_updown=True)
    randomise(model)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 9]), torch.tensor([0, 4])
    expected = model(x, t, y)
    model.convert_to_fp16()
    got = model(x, t, y)
    assert got.dtype == torch.float32
    error = (got - expected).norm() / expected.norm()
    assert 1e-5 < error < 1e-2  # 16-bit, and no worse


def test_bfloat16_autocast_computes_the_same_network(randomise):
    model = small(use_scale_shift_norm=True)
    randomise(model)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    expected = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, t)
    error = (got - expected).norm() / expected.norm()
    assert 1e-4 < error < 5e-2


def test_the_network_compiles_to_one_graph(randomise):
    torch._dynamo.reset()
    model = small(num_classes=5)
    randomise(model)
    args = torch.randn(1, 3, 8, 8), torch.tensor([1]), torch.tensor([2])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), model(*args))


def test_classes_are_given_if_and_only_if_the_model_has_them():
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"num_classes=5, so y must hold 2 .* got None"):
        small(num_classes=5)(x, t)
    with pytest.raises(ValueError, match=r"of shape \(2,\), got shape \(1,\)"):
        small(num_classes=5)(x, t, torch.tensor([1]))
    with pytest.raises(ValueError, match="num_classes=None"):
        small()(x, t, torch.tensor([1, 2]))


@pytest.mark.parametrize(("dims", "sizes"), [(1, (7,)), (2, (8, 6)), (3, (3, 8, 6))])
def test_sizes_that_the_levels_cannot_halve_are_refused(dims, sizes):
    model = small(dims=dims, channel_mult=(1, 1, 1))
    with pytest.raises(ValueError, match="3 levels need sizes that are multiples of 4"):
        model(torch.zeros(1, 3, *sizes), torch.zeros(1))


def test_the_depth_of_3d_is_free():
    model = small(dims=3, channel_mult=(1, 1, 1))
    assert model(torch.zeros(1, 3, 3, 4, 8), torch.zeros(1)).shape == (1, 6, 3, 4, 8)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_super_resolution_sees_the_upsampled_image_beside_the_noisy_one(randomise, dims):
    model = small(SuperResModel, dims=dims, num_classes=5)
    randomise(model)
    plain = small(in_channels=6, dims=dims, num_classes=5)
    plain.load_state_dict(model.state_dict())
    sizes = SIZES[dims]
    x, low = torch.randn(2, 3, *sizes), torch.randn(2, 3, *(size // 2 for size in sizes))
    mode = ("linear", "bilinear", "trilinear")[dims - 1]
    both = torch.cat([x, F.interpolate(low, size=sizes, mode=mode, align_corners=False)], 1)
    t, y = torch.tensor([1, 9]), torch.tensor([0, 4])
    assert torch.equal(model(x, t, low_res=low, y=y), plain(both, t, y))


def test_super_resolution_needs_the_low_resolution_image():
    with pytest.raises(ValueError, match="low_res is missing"):
        small(SuperResModel)(torch.zeros(1, 3, 8, 8), torch.zeros(1))
