"""What constructors say to arguments of the wrong kind, or that cannot be."""

import numpy as np
import pytest
import torch
from torch import nn

from resblock_bench import kernels
from resblock_bench.reference import (
    AttentionBlock,
    Downsample,
    EDMBlock,
    EDMUNet,
    EncoderUNetModel,
    GroupNorm32,
    ResBlock,
    SuperResModel,
    UNetConfig,
    UNetModel,
    Upsample,
    build,
    normalization,
    timestep_embedding,
)
from resblock_bench.reference.attention import AttentionPool
from resblock_bench.reference.edm_block import edm_group_norm

TORSO = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}
BLOCK = {"channels": 32, "emb_channels": 8, "dropout": 0.0}
EDM_BLOCK = {"in_channels": 16, "out_channels": 16, "emb_channels": 8}
EDM = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "variant": "adm",
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_blocks": 1,
}
CONFIG = {
    "family": "unet",
    "image_size": 8,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
}
POOL = {"tokens": 4, "channels": 16, "head_channels": 8, "out_channels": 5}
NORM = {"num_groups": 4, "num_channels": 8}
RESAMPLING = {"channels": 4, "use_conv": False}
NAN = float("nan")

# Class, its valid arguments, the name and value that is wrong, and what is said.
WRONG_TYPES = [
    (
        UNetModel,
        TORSO,
        "attention_resolutions",
        ("16",),
        r"set of integers, got \('16',\).*int\(\)",
    ),
    (UNetModel, TORSO, "attention_resolutions", "16,8", "tuple, list or set of integers"),
    (UNetModel, TORSO, "attention_resolutions", 16, r"set of integers, got 16 \(int\)"),
    (UNetModel, TORSO, "attention_resolutions", (2.0,), "set of integers"),
    (UNetModel, TORSO, "channel_mult", "1,2", r"tuple or list of numbers, got '1,2' \(str\)"),
    (UNetModel, TORSO, "channel_mult", ("1", "2"), "tuple or list of numbers"),
    (UNetModel, TORSO, "channel_mult", None, "tuple or list of numbers, got None"),
    (UNetModel, TORSO, "model_channels", 32.0, r"must be an integer, got 32.0 \(float\)"),
    (UNetModel, TORSO, "num_res_blocks", (1, 1), "must be an integer"),
    (UNetModel, TORSO, "image_size", None, "must be an integer, got None"),
    (UNetModel, TORSO, "in_channels", "3", "must be an integer, got '3'"),
    (UNetModel, TORSO, "num_classes", 10.0, "must be an integer"),
    (UNetModel, TORSO, "num_heads", True, "must be an integer, got True"),
    (UNetModel, TORSO, "num_head_channels", None, "must be an integer, got None"),
    (UNetModel, TORSO, "num_heads_upsample", "4", "must be an integer, got '4'"),
    (UNetModel, TORSO, "dropout", "0.1", r"must be a number, got '0.1' \(str\)"),
    (UNetModel, TORSO, "dropout", None, "must be a number, got None"),
    (UNetModel, TORSO, "use_checkpoint", "False", "must be True or False, got 'False'"),
    (UNetModel, TORSO, "use_fp16", "no", "must be True or False"),
    (UNetModel, TORSO, "resblock_updown", 2, "must be True or False, got 2"),
    (UNetModel, TORSO, "conv_resample", None, "must be True or False, got None"),
    (SuperResModel, TORSO, "in_channels", "3", "must be an integer, got '3'"),
    (EncoderUNetModel, TORSO, "out_channels", None, "must be an integer, got None"),
    (EncoderUNetModel, TORSO, "attention_resolutions", ("2",), "set of integers"),
    (ResBlock, BLOCK, "channels", 32.0, "must be an integer"),
    (ResBlock, BLOCK, "emb_channels", None, "must be an integer"),
    (ResBlock, BLOCK, "out_channels", "64", "must be an integer"),
    (ResBlock, BLOCK, "dropout", "none", "must be a number"),
    (ResBlock, BLOCK, "up", "yes", "must be True or False"),
    (ResBlock, BLOCK, "use_scale_shift_norm", np.ones(2), "must be True or False, got array"),
    (Upsample, RESAMPLING, "channels", 4.0, "must be an integer"),
    (Upsample, RESAMPLING, "use_conv", "False", "must be True or False"),
    (Downsample, RESAMPLING, "out_channels", 4.0, "must be an integer"),
    (AttentionBlock, {"channels": 64}, "num_heads", 2.0, "must be an integer"),
    (AttentionBlock, {"channels": 64}, "use_checkpoint", "False", "must be True or False"),
    (AttentionPool, POOL, "tokens", 4.0, "must be an integer"),
    (EDMBlock, EDM_BLOCK, "in_channels", "16", "must be an integer"),
    (EDMBlock, EDM_BLOCK, "num_heads", 1.0, "must be an integer"),
    (EDMBlock, EDM_BLOCK, "eps", None, "must be a number"),
    (EDMBlock, EDM_BLOCK, "attention", "False", "must be True or False"),
    (EDMUNet, EDM, "label_dim", None, "must be an integer"),
    (EDMUNet, EDM, "attn_resolutions", ("8",), "set of integers"),
    (EDMUNet, EDM, "channel_mult", 2, "tuple or list of numbers"),
    (UNetConfig, CONFIG, "attention_resolutions", ("4",), "set of integers"),
    (UNetConfig, CONFIG, "image_size", 8.0, "must be an integer"),
    (UNetConfig, CONFIG, "train_batch", "128", "must be an integer"),
    (UNetConfig, CONFIG, "resblock_updown", "False", "must be True or False"),
    (GroupNorm32, NORM, "num_groups", 4.0, "must be an integer"),
    (GroupNorm32, NORM, "affine", "False", "must be True or False"),
    (kernels.GroupNormSiLU, NORM, "num_channels", None, "must be an integer"),
    (kernels.GroupNormSiLU, NORM, "eps", "1e-5", "must be a number"),
    (kernels.ResBlock, BLOCK, "dropout", "0.1", "must be a number"),
    (kernels.EDMBlock, EDM_BLOCK, "skip_scale", "0.5", "must be a number"),
]
IMPOSSIBLE = [
    (UNetModel, TORSO, "attention_resolutions", (16,), r"rates, not pixels; got \(16,\).*\[1, 2\]"),
    (UNetModel, TORSO, "attention_resolutions", [0], r"integers of at least 1, got \[0\]"),
    (UNetModel, TORSO, "channel_mult", (), r"at least one number, and positive ones, got \(\)"),
    (UNetModel, TORSO, "channel_mult", (1, -2), "positive ones"),
    (UNetModel, TORSO, "channel_mult", (1, NAN), "positive ones"),
    (UNetModel, TORSO, "channel_mult", (1, 1.5), r"normalization\(48\)"),
    (UNetModel, TORSO, "model_channels", 0, "must be at least 1, got 0"),
    (UNetModel, TORSO, "num_res_blocks", 0, "must be at least 1, got 0"),
    (UNetModel, TORSO, "num_classes", 0, "must be at least 1, got 0"),
    (UNetModel, TORSO, "num_heads", 0, "must be at least 1, got 0"),
    (UNetModel, TORSO, "num_head_channels", -2, "must be at least -1, got -2"),
    (UNetModel, TORSO, "dims", 4, "must be 1, 2 or 3, got 4"),
    (UNetModel, TORSO, "dims", True, "must be 1, 2 or 3, got True"),
    (UNetModel, TORSO, "dropout", 1.0, r"\[0, 1\), got 1.0"),
    (UNetModel, TORSO, "dropout", NAN, r"\[0, 1\), got nan"),
    (EncoderUNetModel, TORSO, "pool", None, "pool must be 'adaptive', .* got None"),
    (EncoderUNetModel, TORSO, "num_res_blocks", -1, "must be at least 1"),
    (ResBlock, BLOCK, "out_channels", 0, "must be at least 1, got 0"),
    (ResBlock, BLOCK, "channels", 48, r"normalization\(48\)"),
    (ResBlock, BLOCK, "dims", 0, "must be 1, 2 or 3"),
    (Upsample, RESAMPLING, "channels", 0, "must be at least 1"),
    (Downsample, RESAMPLING, "dims", 4, "must be 1, 2 or 3"),
    (AttentionPool, POOL, "tokens", 0, "must be at least 1"),
    (EDMBlock, EDM_BLOCK, "in_channels", 2, "edm_group_norm: 2 channels cannot be split"),
    (EDMBlock, EDM_BLOCK, "out_channels", 130, "edm_group_norm: 130 channels cannot be split"),
    (EDMBlock, EDM_BLOCK, "channels_per_head", 0, "must be at least 1"),
    (EDMBlock, EDM_BLOCK, "skip_scale", float("inf"), "must be finite, got inf"),
    (EDMBlock, EDM_BLOCK, "eps", -1e-5, "finite and at least 0, got -1e-05"),
    (EDMUNet, EDM, "label_dim", -1, "must be at least 0"),
    (EDMUNet, EDM, "img_resolution", 1, "cannot be halved for 2 levels; it must be at least 2"),
    (EDMUNet, EDM, "model_channels", 2, "must be at least 4"),
    (UNetConfig, CONFIG, "attention_resolutions", (0,), "integers of at least 1"),
    (UNetConfig, CONFIG, "num_classes", 0, "must be at least 1"),
    (GroupNorm32, NORM, "num_groups", 0, "must be at least 1"),
    (
        GroupNorm32,
        NORM,
        "num_groups",
        3,
        "8 channels cannot be divided into 3 groups.*divisor of 8",
    ),
    (GroupNorm32, NORM, "eps", NAN, "finite and at least 0, got nan"),
    (kernels.GroupNormSiLU, NORM, "num_groups", -4, "must be at least 1"),
    (kernels.GroupNormSiLU, NORM, "activation", "relu", "must be 'silu' or None, got 'relu'"),
    (kernels.ResBlock, BLOCK, "checkpoint", None, "checkpoint is None; allowed are"),
    (kernels.EDMBlock, EDM_BLOCK, "checkpoint", ["full"], "checkpoint is .*allowed are"),
]


def construct(make, valid, name, value):
    with torch.device("meta"):
        make(**valid)  # the other arguments are not what is refused
        return make(**(valid | {name: value}))


@pytest.mark.parametrize(("make", "valid", "name", "value", "message"), WRONG_TYPES)
def test_wrong_types(make, valid, name, value, message):
    with pytest.raises(TypeError, match=message) as refused:
        construct(make, valid, name, value)
    assert str(refused.value).startswith(f"{make.__name__}: {name} must be ")


@pytest.mark.parametrize(("make", "valid", "name", "value", "message"), IMPOSSIBLE)
def test_impossible_values(make, valid, name, value, message):
    with pytest.raises(ValueError, match=message):
        construct(make, valid, name, value)


def test_attention_pool_needs_something_to_pool():
    options = TORSO | {"image_size": 1, "pool": "attention", "num_head_channels": 32}
    with pytest.raises(ValueError, match="image_size=1 leaves nothing to pool after 2 levels"):
        EncoderUNetModel(**options)


def test_functions():
    with pytest.raises(TypeError, match=r"channels must be an integer, got 32\.0"):
        normalization(32.0)
    with pytest.raises(ValueError, match="edm_group_norm: 3 channels cannot be split"):
        edm_group_norm(3, 1e-5)
    with pytest.raises(
        TypeError, match=r"timesteps must be a tensor of shape \(N,\), got 3 \(int\)"
    ):
        timestep_embedding(3, 8)
    with pytest.raises(TypeError, match="dim must be an integer, got '8'"):
        timestep_embedding(torch.zeros(2), "8")
    with pytest.raises(TypeError, match="use_fp16 must be True or False, got 'no'"):
        build("iddpm-cifar10-uncond", use_fp16="no")
    for name in (None, 3, ["iddpm-cifar10-uncond"]):
        with pytest.raises(ValueError, match="no published model is called"):
            build(name)
    for model in (None, "iddpm-cifar10-uncond", ResBlock):
        with pytest.raises(TypeError, match=r"fuse_: model must be an nn\.Module, got"):
            kernels.fuse_(model)
    with pytest.raises(ValueError, match="checkpoint is True; allowed are"):
        kernels.fuse_(nn.Identity(), True)


@pytest.mark.parametrize("x", [torch.zeros(32, 4), np.zeros((1, 32, 4, 4)), None], ids=type)
def test_blocks_say_what_x_is(x):
    with pytest.raises(TypeError, match=r"ResBlock: x must be a tensor of shape \(N, 32, \*spat"):
        ResBlock(**BLOCK)(x, torch.zeros(1, 8))


@pytest.mark.parametrize(
    "resolutions", [(2,), [2], {2}, frozenset({1, 2}), (), np.array([1, 2]), (2, 4, 8), range(3, 1)]
)
def test_attention_resolutions_in_any_collection(resolutions):
    """Rates that some level has, beside others that none has, as scripts for several sizes pass."""
    model = construct(UNetModel, TORSO, "attention_resolutions", resolutions)
    blocks = sum(isinstance(m, AttentionBlock) for m in model.input_blocks.modules())
    assert blocks == len({1, 2} & set(resolutions))


def test_call_sites_of_guided_diffusion_stay_valid():
    """script_util.create_model, create_classifier and sr_create_model, argument for argument."""
    shared = {
        "image_size": 64,
        "in_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": tuple(64 // int(res) for res in ["32", "16", "8"]),
        "channel_mult": tuple(int(mult) for mult in ["1", "2", "3", "4"]),
        "use_fp16": False,
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    model = {
        "out_channels": (3 if not True else 6),
        "dropout": 0,
        "num_classes": (1000 if True else None),
        "use_checkpoint": False,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "use_new_attention_order": False,
    }
    with torch.device("meta"):
        UNetModel(**shared, **model)
        UNetModel(**shared, **(model | {"num_classes": None, "dropout": 0.1}))
        SuperResModel(**shared, **model)
        EncoderUNetModel(**shared, out_channels=1000, pool="attention")
        ResBlock(32, 128, 0, out_channels=None, dims=2, use_conv=False)
        UNetModel(**(shared | {"channel_mult": [np.int64(1), 0.5 * 2]}), **model)
        # Latent diffusion's way to say that the heads follow from their channels.
        UNetModel(**shared, **(model | {"num_heads": -1}))
