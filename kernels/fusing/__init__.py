"""Fusing a model in place, also one that nobody here wrote, and undoing it.

Read in this order:

    family      what a family of classes is, and how a module becomes fused and what it was again
    trial       whether a class that nobody here wrote computes what its structure says
    norm        a group norm alone
    sequential  a group norm with the SiLU and the dropout behind it, inside an nn.Sequential
    own         the blocks of this project
    openai      improved-diffusion's and guided-diffusion's residual block
    edm         the blocks of EDM's original networks
    diffusers   those of Hugging Face's diffusers
    verify      a fused module against a float64 copy of what it was
    fuse        fuse_: which family knows a module, and the report
    unfuse      unfuse_
"""

from .fuse import FuseReport, fuse_
from .unfuse import unfuse_

__all__ = ["FuseReport", "fuse_", "unfuse_"]
