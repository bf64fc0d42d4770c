"""Every norm of the published models' residual blocks, with how much of them it is."""

from __future__ import annotations

from functools import partial
from itertools import product

from resblock_bench.bench.compiled.norms import Norm, norms_of_block
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import Selection, axes
from resblock_bench.bench.grid.grid import GROUPS, plan
from resblock_bench.bench.records import DType, Layout
from resblock_bench.reference import PUBLISHED
from resblock_bench.reference.configs import UNetConfig

_EDM_GROUP = 4
"""Channels of a group, at least, in EDM's blocks: min(32, C / 4) groups."""


def published_norms(batch: int, dtype: DType, layout: Layout) -> dict[Norm, int]:
    """Both norms of every block of all published models, each once, with C·HW × its count.

    With the model's dropout and groups.
    """
    how: Selection = {"batch": (batch,), "dtype": (dtype,), "layout": (layout,)}
    found: dict[Norm, int] = {}
    for model, config in PUBLISHED.items():
        one: Selection = {"model": (model,), **how, "mode": ("inference",), "impl": ("fused",)}
        for item in plan([one], of_any_kind=True):
            for norm in norms_of_block(item.cell, partial(groups_of, config)):
                elements = norm.channels * norm.positions * item.multiplicity
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
