"""A tiny model that tests may name like a published one."""

import gc
from typing import Any

import pytest

from resblock_bench.bench.records import Cell
from resblock_bench.reference import PUBLISHED, UNetConfig

NAME = "tiny"
SIZES: dict[str, Any] = {
    "image_size": 8,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
}
WIDE = {**SIZES, "model_channels": 64, "num_head_channels": 64, "resblock_updown": True}
CONFIGS = {
    "unet": UNetConfig(family="unet", num_classes=10, dropout=0.1, num_heads=2, **SIZES),
    "super_res": UNetConfig(family="super_res", use_scale_shift_norm=False, **SIZES),
    "encoder": UNetConfig(family="encoder", **{**WIDE, "out_channels": 10}),
    "edm_adm": UNetConfig(
        family="edm_adm", num_classes=10, augment_dim=9, dropout=0.1, **{**WIDE, "out_channels": 3}
    ),
}


def register(monkeypatch: pytest.MonkeyPatch, config: UNetConfig) -> None:
    """Make a model a published one, wherever these have been imported."""
    (known,) = gc.get_referents(PUBLISHED)
    monkeypatch.setitem(known, NAME, config)


def model_cell(config: UNetConfig, **changes: Any) -> Cell:
    fields: dict[str, Any] = {
        "model": NAME,
        "dims": 2,
        "resolution": config.image_size,
        "channels": config.in_channels,
        "out_channels": config.out_channels,
        "emb_channels": config.emb_channels,
        "conditioning": "scale_shift" if config.use_scale_shift_norm else "add",
        "dropout": config.dropout,
        "updown": "none",
        "batch": 2,
        "dtype": "fp32",
        "layout": "nchw",
        "mode": "train",
        "impl": "reference",
        "checkpoint": "none",
        "workload": "model",
    }
    return Cell(**{**fields, **changes})
