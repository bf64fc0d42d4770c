"""Where a model runs its residual blocks, and at which shapes.

Worked out from the configuration alone, so that a benchmark can lay out its grid, and count the
blocks that a measurement stands for, without building the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from .configs import UNetConfig, published


@dataclass(frozen=True, slots=True)
class Site:
    """A run of equal residual blocks.

    level                  0 is the input's resolution
    position               "encoder", "middle" or "decoder"
    c_in, c_out            channels of the block's input and output
    h, w                   size of the block's input (an up or down block changes it inside)
    emb_channels           E
    use_scale_shift_norm   modulation after the norm, else addition before it
    dropout                probability
    updown                 "none", "up" or "down"
    count                  how many such blocks follow one another
    """

    level: int
    position: str
    c_in: int
    c_out: int
    h: int
    w: int
    emb_channels: int
    use_scale_shift_norm: bool
    dropout: float
    updown: str
    count: int


def resblock_sites(config_or_name: UNetConfig | str) -> Iterator[Site]:
    """The residual blocks of a model in the order they run, equal neighbours counted together."""
    config = published(config_or_name)
    for site, run in groupby(_every_block(config)):
        yield replace(site, count=sum(1 for _ in run))


def _every_block(config: UNetConfig) -> Iterator[Site]:
    widths = config.widths
    deepest = len(widths) - 1

    def site(
        level: int,
        position: str,
        c_in: int,
        c_out: int,
        updown: Literal["none", "up", "down"] = "none",
    ) -> Site:
        size = config.image_size >> level
        return Site(
            level=level,
            position=position,
            c_in=c_in,
            c_out=c_out,
            h=size,
            w=size,
            emb_channels=config.emb_channels,
            use_scale_shift_norm=config.use_scale_shift_norm,
            dropout=config.dropout,
            updown=updown,
            count=1,
        )

    # DDPM++ enters at the base width, the others at that of the first level.
    c = config.model_channels if config.family == "edm_ddpmpp" else widths[0]
    skips = [c]
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            yield site(level, "encoder", c, width)
            c = width
            skips.append(c)
        if level < deepest:
            if config.resblock_updown:
                yield site(level, "encoder", c, c, "down")
            skips.append(c)
    yield site(deepest, "middle", c, c)
    yield site(deepest, "middle", c, c)
    if config.family == "encoder":
        return
    for level in range(deepest, -1, -1):
        for _ in range(config.num_res_blocks + 1):
            yield site(level, "decoder", c + skips.pop(), widths[level])
            c = widths[level]
        if level > 0 and config.resblock_updown:
            yield site(level, "decoder", c, c, "up")
