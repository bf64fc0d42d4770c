"""The models as published, in plain PyTorch: what everything else is measured against.

IDDPM's and ADM's residual block and U-Nets (improved-diffusion, guided-diffusion) and EDM's, with
the constructor keywords and state-dict keys of the originals, so that released weights load.
"""

from .attention import AttentionBlock
from .blocks import (
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)
from .checkpoint import checkpoint
from .configs import PUBLISHED, UNetConfig, build
from .edm import EDMUNet
from .edm_block import EDMBlock
from .encoder import EncoderUNetModel
from .layers import (
    GroupNorm,
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from .sites import Site, resblock_sites
from .unet import SuperResModel, UNetModel

__all__ = [
    "PUBLISHED",
    "AttentionBlock",
    "Downsample",
    "EDMBlock",
    "EDMUNet",
    "EncoderUNetModel",
    "GroupNorm",
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
