"""Group norm, scale-shift and SiLU fused, forward and backward, as function, module and block.

`group_norm_silu` is the operator, `GroupNormSiLU` its module, `ResBlock` and `EDMBlock` the
residual blocks built on it, `fuse_` the way to put them into a model, `explain` what a call does.
On CUDA the operator runs in Triton, elsewhere in PyTorch's own kernels; `prefer` overrides that.
"""

from resblock_bench.kernels.blocks import CheckpointMode, EDMBlock, ResBlock
from resblock_bench.kernels.dispatch import prefer
from resblock_bench.kernels.functional import explain, group_norm_silu, norm_act_conv
from resblock_bench.kernels.fuse import FuseReport, fuse_
from resblock_bench.kernels.modules import GroupNormSiLU

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
]
