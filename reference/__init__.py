"""The models as published, in plain PyTorch: what everything else is measured against.

IDDPM's and ADM's residual block and U-Nets (improved-diffusion, guided-diffusion) and EDM's, with
the constructor keywords and state-dict keys of the originals, so that released weights load.
"""

from resblock_bench.reference.attention import AttentionBlock
from resblock_bench.reference.blocks import (
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)
from resblock_bench.reference.checkpoint import checkpoint
from resblock_bench.reference.configs import PUBLISHED, UNetConfig, build
from resblock_bench.reference.edm import EDMUNet
from resblock_bench.reference.edm_block import EDMBlock
from resblock_bench.reference.encoder import EncoderUNetModel
from resblock_bench.reference.layers import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from resblock_bench.reference.sites import Site, resblock_sites
from resblock_bench.reference.unet import SuperResModel, UNetModel

__all__ = [
    "PUBLISHED",
    "AttentionBlock",
    "Downsample",
    "EDMBlock",
    "EDMUNet",
    "EncoderUNetModel",
    "GroupNorm32",
    "ResBlock",
    "SiLU",
    "Site",
    "SuperResModel",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetConfig",
    "UNetModel",
    "Upsample",
    "avg_pool_nd",
    "build",
    "checkpoint",
    "conv_nd",
    "linear",
    "normalization",
    "resblock_sites",
    "timestep_embedding",
    "zero_module",
]
