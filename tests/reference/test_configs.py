"""configs.py and sites.py: the published models, their sizes and their blocks."""

import csv
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from resblock_bench.reference import (
    PUBLISHED,
    AttentionBlock,
    EDMBlock,
    EDMUNet,
    ResBlock,
    Site,
    UNetConfig,
    build,
    resblock_sites,
)

DATA = Path(__file__).parents[1] / "data"


def rows(name):
    with open(DATA / name, newline="") as f:
        return list(csv.DictReader(f))


MODELS = {row["model"]: row for row in rows("published_models.csv")}
SHAPES = rows("resblock_shapes.csv")


@cache
def on_meta(name):
    """Built once for all tests, which leave it as it is."""
    with torch.device("meta"):
        return build(name)


def test_the_published_names_in_their_order():
    assert list(PUBLISHED) == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_blocks_of_a_published_model(name):
    model = on_meta(name)
    blocks = [m for m in model.modules() if isinstance(m, ResBlock | EDMBlock)]
    attention = [
        m
        for m in model.modules()
        if isinstance(m, AttentionBlock) or (isinstance(m, EDMBlock) and m.num_heads)
    ]
    assert {
        "model": name,
        "resblocks": str(len(blocks)),
        "attention_blocks": str(len(attention)),
        "emb_channels": str(PUBLISHED[name].emb_channels),
        "parameters": str(sum(p.numel() for p in model.parameters())),
    } == MODELS[name]
    assert {block.emb_channels for block in blocks} == {PUBLISHED[name].emb_channels}
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_the_published_shapes_row_for_row(name):
    expected = [row for row in SHAPES if row["model"] == name]
    assert expected
    got = [
        {
            "model": name,
            "resolution": str(PUBLISHED[name].image_size),
            **{
                key: str(int(value) if isinstance(value, bool) else value)
                for key, value in asdict(site).items()
            },
        }
        for site in resblock_sites(name)
    ]
    assert got == expected


def test_the_fields_of_a_site_are_the_columns_of_the_table():
    columns = [c for c in SHAPES[0] if c not in ("model", "resolution")]
    assert [f.name for f in fields(Site)] == columns


def test_sites_of_a_config_are_those_of_its_name():
    name = "adm-imagenet64-cond"
    assert list(resblock_sites(PUBLISHED[name])) == list(resblock_sites(name))


# One of every family and every way of resampling.
@pytest.mark.parametrize(
    "name",
    [
        "iddpm-cifar10-uncond",
        "iddpm-lsun256-bedroom",
        "adm-imagenet64-cond",
        "adm-imagenet512-cond",
        "adm-upsample-64-256",
        "adm-classifier128",
        "edm-imagenet64-adm",
        "edm-cifar10-ddpmpp-cond",
    ],
)
def test_sites_are_the_shapes_seen_when_the_model_runs(name):
    config = PUBLISHED[name]
    model = on_meta(name)
    seen = []

    def watch(block, args):
        x, emb = args
        if isinstance(block, EDMBlock):
            c_in, how, scale_shift = block.in_channels, block.resample, block.adaptive_scale
        else:
            c_in, scale_shift = block.channels, block.use_scale_shift_norm
            how = type(block.x_upd).__name__.lower().replace("sample", "")
            how = None if how == "identity" else how
        assert x.shape[1] == c_in
        seen.append(
            (c_in, block.out_channels, *x.shape[2:], emb.shape[1], scale_shift, block.dropout, how)
        )

    blocks = [m for m in model.modules() if isinstance(m, ResBlock | EDMBlock)]
    hooks = [block.register_forward_pre_hook(watch) for block in blocks]
    size = config.image_size
    inputs = {"x": torch.empty(2, 3, size, size, device="meta"), "timesteps": torch.zeros(2)}
    if config.num_classes:
        inputs["y"] = torch.zeros(2, dtype=torch.long, device="meta")
    if config.family == "super_res":
        inputs["low_res"] = torch.empty(2, 3, size // 4, size // 4, device="meta")
    inputs["timesteps"] = inputs["timesteps"].to("meta")
    with torch.no_grad():
        out = model(**inputs)
    for hook in hooks:
        hook.remove()
    classifies = config.family == "encoder"
    assert out.shape == ((2, 1000) if classifies else (2, config.out_channels, size, size))

    expected = []
    for s in resblock_sites(name):
        how = None if s.updown == "none" else s.updown
        run = (s.c_in, s.c_out, s.h, s.w, s.emb_channels, s.use_scale_shift_norm, s.dropout, how)
        expected += [run] * s.count
    assert seen == expected


@pytest.mark.parametrize("name", MODELS)
def test_sites_account_for_the_parameters_of_all_blocks(name):
    """2·C_in + 9·C_in·C_out + C_out + (E + 1)·(2 or 1)·C_out + 2·C_out + 9·C_out² + C_out, …"""
    total = 0
    for s in resblock_sites(name):
        i, o, wide = s.c_in, s.c_out, 2 if s.use_scale_shift_norm else 1
        one = 2 * i + 9 * i * o + o + (s.emb_channels + 1) * wide * o + 2 * o + 9 * o * o + o
        projects = i != o or (name.endswith(("ddpmpp", "ddpmpp-cond")) and s.updown != "none")
        total += s.count * (one + projects * (i * o + o))
    model = on_meta(name)
    in_attention = (".norm2.", ".qkv.", ".proj.")
    assert total == sum(
        p.numel()
        for block in model.modules()
        if isinstance(block, ResBlock | EDMBlock)
        for key, p in block.named_parameters(prefix="")
        if not f".{key}".startswith(in_attention)
    )


def test_groups_of_the_published_blocks_are_mostly_no_powers_of_two():
    """The reason why kernels may not assume one: the channels of a group, over all models."""
    widths = Counter()
    for name in PUBLISHED:
        if not name.startswith("edm"):
            for s in resblock_sites(name):
                widths[s.c_in // 32] += s.count
    assert {2, 4, 6, 8, 12, 16, 18, 24, 32, 36, 40, 42, 48, 56, 64} <= set(widths)


def test_unknown_names_are_refused_with_the_known_ones():
    for f in (build, lambda name: list(resblock_sites(name))):
        with pytest.raises(ValueError, match=r"'adm-imagenet65'.*iddpm-cifar10-uncond, iddpm"):
            f("adm-imagenet65")


def test_published_configs_cannot_be_changed():
    with pytest.raises(AttributeError):
        PUBLISHED["adm-lsun256"].dropout = 0.5
    with pytest.raises(TypeError):
        PUBLISHED["adm-lsun256"] = PUBLISHED["adm-lsun256"]


TINY = UNetConfig(
    family="unet",
    image_size=8,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.1,
    num_classes=5,
)


def test_build_passes_its_options_on():
    model = build(TINY, use_checkpoint=True, use_fp16=True)
    assert model.dtype == torch.float16
    assert model.middle_block[0].use_checkpoint
    assert model.middle_block[1].use_checkpoint
    model = build(TINY)
    assert model.dtype == torch.float32
    assert not model.middle_block[0].use_checkpoint
    assert model.middle_block[0].dropout == 0.1
    assert model.num_classes == 5


def test_attention_stands_at_the_resolutions_in_pixels():
    model = build(TINY)
    has = [any(isinstance(m, AttentionBlock) for m in b.modules()) for b in model.input_blocks]
    assert has == [False, False, False, True]  # 8 pixels without, 4 with


@pytest.mark.parametrize("sizes", [(5,), (4, 2), (7, 4)])
def test_attention_at_a_resolution_that_no_level_has_is_refused(sizes):
    """7 of 8 pixels would be attention at all 8, and 2 beside 4 none."""
    foreign = next(size for size in sizes if size != 4)
    with pytest.raises(ValueError, match=rf"are in pixels, and no level has {foreign}: .* 8, 4$"):
        replace(TINY, attention_resolutions=sizes)


def test_configs_that_no_network_matches_are_refused():
    """The sites are read off the config, so the config must not say what the network is not."""
    with pytest.raises(ValueError, match=r"family must be 'unet', .*got 'vit'"):
        replace(TINY, family="vit")
    edm = PUBLISHED["edm-cifar10-ddpmpp-cond"]
    for field, value in [
        ("use_scale_shift_norm", True),
        ("resblock_updown", False),
        ("num_heads", 2),
        ("num_head_channels", 64),
    ]:
        with pytest.raises(ValueError, match=f"'edm_ddpmpp' always has {field}=.*, got {value}"):
            replace(edm, **{field: value})
    with pytest.raises(ValueError, match="'edm_adm' always has use_scale_shift_norm=True"):
        replace(PUBLISHED["edm-imagenet64-adm"], use_scale_shift_norm=False)


def test_float16_blocks_are_refused_for_edm():
    with pytest.raises(ValueError, match="use_fp16 is not available for family 'edm_adm'"):
        build("edm-imagenet64-adm", use_fp16=True)


def test_heads_of_the_published_models():
    """Legacy or new order and the heads are not in the parameter count, but in the weights."""

    def attention(name):
        return [m for m in on_meta(name).modules() if isinstance(m, AttentionBlock)]

    for name, config in PUBLISHED.items():
        if config.family.startswith("edm"):
            continue
        blocks = attention(name)
        assert {b.use_new_attention_order for b in blocks} == {name == "adm-imagenet64-cond"}
        if name == "iddpm-lsun256-bedroom":
            assert {b.num_heads for b in blocks} == {1}
        elif name.startswith("iddpm") or name in ("adm-imagenet128-cond", "adm-upsample-64-256"):
            assert {b.num_heads for b in blocks} == {4}
        else:
            assert {b.channels // b.num_heads for b in blocks} == {64}


def test_edm_models_are_their_variants():
    variants = {
        name: (model.variant, model.label_dim, model.augment_dim)
        for name in PUBLISHED
        if isinstance(model := on_meta(name), EDMUNet)
    }
    assert variants == {
        "edm-imagenet64-adm": ("adm", 1000, 9),
        "edm-cifar10-ddpmpp-cond": ("ddpmpp", 10, 9),
        "edm-ffhq64-ddpmpp": ("ddpmpp", 0, 9),
    }
