"""Group norm, scale-shift and SiLU fused, forward and backward, as function, module and block.

`group_norm_silu` is the operator, `GroupNormSiLU` its module, `ResBlock` and `EDMBlock` the
residual blocks built on it, `fuse_` the way to put them into a model (`unfuse_` takes them out),
`explain` what a call does.
On CUDA the operator runs in Triton, elsewhere in PyTorch's own kernels; `prefer` overrides that.
"""

from .blocks import CheckpointMode, EDMBlock, ResBlock
from .dispatch import prefer
from .functional import explain, group_norm_silu, norm_act_conv
from .fusing import FuseReport, fuse_, unfuse_
from .modules import GroupNormSiLU

__all__ = [
    "CheckpointMode",
    "EDMBlock",
    "FuseReport",
    "GroupNormSiLU",
    "ResBlock",
    "explain",
    "fuse_",
    "group_norm_silu",
    "norm_act_conv",
    "prefer",
    "unfuse_",
]
