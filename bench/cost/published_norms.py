"""Every norm of the published models' residual blocks, with how much of them it is."""

from __future__ import annotations

from itertools import product
from typing import Any

from resblock_bench.bench.compiled.norms import Norm
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import Selection, axes
from resblock_bench.bench.records import DType, Layout
from resblock_bench.reference import PUBLISHED, resblock_sites
from resblock_bench.reference.configs import UNetConfig

GROUPS = 32
_EDM_GROUP = 4
"""Channels of a group, at least, in EDM's blocks: min(32, C / 4) groups."""


def published_norms(batch: int, dtype: DType, layout: Layout) -> dict[Norm, int]:
    """Both norms of every block of all published models, each once, with C·HW × its count.

    As the fused block runs them on a GPU, with the model's dropout: conv1's bias is in the add
    before the second norm.
    """
    found: dict[Norm, int] = {}
    for config in PUBLISHED.values():
        for site in resblock_sites(config):
            factor = {"up": 2, "down": 0.5, "none": 1}[site.updown]
            inner = int(site.h * factor) * int(site.w * factor)
            common: dict[str, Any] = {"batch": batch, "dtype": dtype, "layout": layout}
            first = Norm(
                channels=site.c_in,
                positions=site.h * site.w,
                groups=groups_of(config, site.c_in),
                modulation="none",
                bias_folded=False,
                dropout=0.0,
                **common,
            )
            second = Norm(
                channels=site.c_out,
                positions=inner,
                groups=groups_of(config, site.c_out),
                modulation="scale_shift" if site.use_scale_shift_norm else "add",
                bias_folded=True,
                dropout=site.dropout,
                **common,
            )
            for norm in (first, second):
                elements = norm.channels * norm.positions * site.count
                found[norm] = found.get(norm, 0) + elements
    return found


def published_weights(selection: Selection) -> dict[Norm, int]:
    """Those of every batch, dtype and layout of a selection, which has no other axis."""
    wrong = sorted(set(selection) - {"batch", "dtype", "layout"})
    if wrong:
        raise UsageError(
            f"--published takes every block of every model: leave out {', '.join(wrong)} "
            "(-a batch, dtype and layout can be given)"
        )
    known = axes()
    values = (selection.get(name, known[name].default) for name in ("batch", "dtype", "layout"))
    weights: dict[Norm, int] = {}
    for how in product(*values):
        weights |= published_norms(*how)  # type: ignore[arg-type]  # an axis has checked them
    return weights


def groups_of(config: UNetConfig, channels: int) -> int:
    """The groups of a norm over so many channels in the model's blocks."""
    return min(GROUPS, channels // _EDM_GROUP) if config.family.startswith("edm") else GROUPS
