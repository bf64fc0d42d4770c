"""Small configurations of diffusers' models; the package is not needed to read them."""

import importlib.util
from typing import Any

import pytest

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs diffusers"
)
LEVELS: dict[str, Any] = {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DModel",
        **LEVELS,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": 10,
    },
    "scale_shift": {
        "_class_name": "UNet2DModel",
        **LEVELS,
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "timestep",
    },
    "text": {
        "_class_name": "UNet2DConditionModel",
        **LEVELS,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 48,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "_class_name": "UNet2DConditionModel",
        **LEVELS,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 48,
        "attention_head_dim": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 40,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        **LEVELS,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    },
}
TINY: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "sample_size": 8,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
