"""From the values asked for to the cells that are measured, in a fixed order.

Without `model` the axes multiply. With it, the sites are the model's own residual blocks, equal
ones merged with their multiplicity, and resolution, channels, out_channels and conditioning pick
among them; dropout overrides the model's. With `workload` the model is run whole, or all of its
blocks are; one of diffusers, by its config.json, is run whole only. Checkpointing exists in train
mode only. All variants (checkpoint × implementation) of one site stand next to each other, so that
what is compared is measured close in time.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import asdict

from resblock_bench.bench.errors import NothingSelectedError, UsageError
from resblock_bench.bench.measure import diffusers_model
from resblock_bench.bench.records import Cell, cell_name
from resblock_bench.bench.units import format_bytes
from resblock_bench.reference import PUBLISHED, resblock_sites

from .axes import MOST_CELLS, AxisValue, Selection, axes, is_config, models

GROUPS = 32
EMB_CHANNELS = 512
"""Width of the embedding without a model: 4·128, that of the IDDPM models."""

_TRUTH_BYTES = 8
_ADDRESSES = 2**60  # Bytes: PyTorch counts those of a tensor in 63 bits.
PICKS = ("resolution", "channels", "out_channels", "conditioning")
"""Axes that choose among the blocks of a model."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell, and how many blocks of its model it stands for (1 without a model)."""

    cell: Cell
    multiplicity: int


def plan(
    selections: Iterable[Selection], *, by_value: bool = False, of_any_kind: bool = False
) -> list[PlannedCell]:
    """The cells of several selections, in order, each cell once.

    by_value    within each selection the heaviest sites first: by activation elements, times how
                often the site occurs in its model. The selections stay in the order given.
    of_any_kind also blocks that this suite has no cells of, for their sizes

    Raises UsageError where nothing is selected.
    """
    planned: dict[Cell, PlannedCell] = {}
    given = list(selections)
    for selection in given:
        if not of_any_kind:
            _refuse_other_blocks(selection)
        _refuse_too_many(selection)
        items = list(_expand(selection))
        if by_value:
            # Stable: the variants of a site stay together.
            items.sort(key=lambda item: weight(item.cell, item.multiplicity), reverse=True)
        for item in items:
            planned.setdefault(item.cell, item)
    if not planned:
        asked = "; ".join(_describe(selection) for selection in given)
        raise NothingSelectedError(
            f"the selection ({asked}) has no cell: checkpoint=selective and checkpoint=full exist "
            "only in mode=train, so add mode=train or checkpoint=none"
        )
    for cell in planned:
        _refuse_too_large(cell)
    return list(planned.values())


def _refuse_too_many(selection: Selection) -> None:
    """Before they are written down. With a model its blocks are picked, else all axes multiply."""
    chosen = {name: selection.get(name, axis.default) for name, axis in axes().items()}
    if chosen["model"]:
        chosen = {name: values for name, values in chosen.items() if name not in PICKS}
    count = math.prod(len(values) for values in chosen.values() if values)
    if count > MOST_CELLS:
        raise UsageError(
            f"the axes have {count:,} combinations, and a plan takes {MOST_CELLS:,} cells: give "
            "fewer values, or several runs"
        )


def _refuse_other_blocks(selection: Selection) -> None:
    others = [str(name) for name in selection.get("model", ()) if name not in models()]
    if others and "block" in selection.get("workload", ("block",)):
        allowed = "workload=model" + ("" if is_config(others[0]) else " or workload=blocks")
        raise UsageError(
            f"{others[0]} is made of blocks of another kind, which are not measured alone: use "
            f"{allowed}"
        )


def _refuse_too_large(cell: Cell) -> None:
    count = weight(cell, 1) * _TRUTH_BYTES
    if count > _ADDRESSES:
        raise UsageError(
            f"{cell_name(cell)} has activations of {format_bytes(count)} in float64, which no "
            "tensor holds: give a smaller batch, resolution or channels"
        )


def weight(cell: Cell, multiplicity: int) -> int:
    """Activation elements, times how often the site occurs in its model; of a model all of them."""
    if cell.config is not None:
        return cell.batch * diffusers_model.activation_elements(cell.config)
    if cell.workload != "block":
        blocks = _sites_of(str(cell.model))
        return sum(count * cell.batch * _elements(**site) for site, count in blocks)
    return multiplicity * cell.batch * _elements(**asdict(cell))


def _elements(
    *, resolution: int, dims: int, channels: int, out_channels: int, **others: object
) -> int:
    """Of one image."""
    return int(resolution**dims) * (channels + out_channels)


def _describe(selection: Selection) -> str:
    return " ".join(f"{name}={','.join(map(str, values))}" for name, values in selection.items())


def _expand(selection: Selection) -> Iterator[PlannedCell]:
    defaults = {name: axis.default for name, axis in axes().items()}
    chosen = {**defaults, **selection}
    variants = [
        {"mode": mode, "checkpoint": checkpoint, "impl": impl}
        for mode in chosen["mode"]
        for checkpoint in chosen["checkpoint"]
        for impl in chosen["impl"]
        if mode == "train" or checkpoint == "none"
    ]
    if "microbatch" in selection and "model" not in chosen["workload"]:
        raise UsageError("microbatch is for workload=model: give it that, or leave it out")
    names = ("batch", "dtype", "layout")
    for workload in chosen["workload"]:
        sites = list(_sites(str(workload), selection, chosen))
        for (site, multiplicity), *values in itertools.product(sites, *(chosen[n] for n in names)):
            for variant in variants:
                fields = {**site, **dict(zip(names, values, strict=True)), **variant}
                cell = msgspec.convert(fields, Cell)
                if cell.microbatch is not None and (
                    cell.mode != "train" or cell.microbatch >= cell.batch
                ):  # one pass takes all
                    cell = msgspec.structs.replace(cell, microbatch=None)
                yield PlannedCell(cell, multiplicity)


def _sites(
    workload: str, selection: Selection, chosen: Mapping[str, tuple[AxisValue, ...]]
) -> Iterator[tuple[dict[str, Any], int]]:
    if workload != "block":
        return _whole_models(workload, selection)
    return _model_sites(selection) if chosen["model"] else _free_sites(chosen)


def _whole_models(workload: str, selection: Selection) -> Iterator[tuple[dict[str, Any], int]]:
    """Each model, or all its blocks, whose sizes are the model's own."""
    if not selection.get("model"):
        raise UsageError(
            f"workload={workload} needs a model: give model=NAME, one of {', '.join(PUBLISHED)}, "
            "or the config.json of a UNet of diffusers"
        )
    wrong = [name for name in PICKS if name in selection]
    if wrong:
        raise UsageError(
            f"workload={workload} runs all of a model, and {', '.join(wrong)} would pick among its "
            "blocks: leave it out, or use workload=block"
        )
    _refuse_dims(selection)
    for model in map(str, selection["model"]):
        own = _sizes_of_config(model, workload) if is_config(model) else _sizes_of_published(model)
        site = {"workload": workload, "dims": 2, "updown": "none", **own}
        microbatches = selection.get("microbatch", (None,)) if workload == "model" else (None,)
        for dropout in selection.get("dropout", (own["dropout"],)):
            for microbatch in microbatches:
                yield {**site, "dropout": dropout, "microbatch": microbatch}, 1


def _sizes_of_published(model: str) -> dict[str, Any]:
    config = PUBLISHED[model]
    return {
        "model": model,
        "resolution": config.image_size,
        "channels": config.in_channels,
        "out_channels": config.out_channels,
        "emb_channels": config.emb_channels,
        "conditioning": "scale_shift" if config.use_scale_shift_norm else "add",
        "dropout": config.dropout,
    }


def _sizes_of_config(path: str, workload: str) -> dict[str, Any]:
    """Of a model of diffusers, and the model itself."""
    if workload != "model":
        raise UsageError(
            f"{path} is a model of diffusers, which is run whole: use workload=model, or leave it "
            "out"
        )
    sizes = diffusers_model.measured_sizes(path, diffusers_model.read_config(path))
    return {
        "model": sizes.name,
        "config": sizes.text,
        "resolution": sizes.side,
        "channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "emb_channels": sizes.emb_channels,
        "conditioning": "scale_shift" if sizes.modulated else "add",
        "dropout": sizes.dropout,
    }


def _free_sites(
    chosen: Mapping[str, tuple[AxisValue, ...]],
) -> Iterator[tuple[dict[str, Any], int]]:
    for name in ("channels", "out_channels"):
        for channels in chosen[name]:
            if int(channels) % GROUPS:
                raise UsageError(
                    f"{name}={channels} cannot be split into the {GROUPS} groups of the block's "
                    f"norm: give a multiple of {GROUPS}"
                )
    names = ("dims", "resolution", "channels", "conditioning", "dropout")
    for values in itertools.product(*(chosen[name] for name in names)):
        site: dict[str, Any] = dict(zip(names, values, strict=True))
        for out_channels in chosen["out_channels"] or (site["channels"],):
            fixed = {"model": None, "emb_channels": EMB_CHANNELS, "updown": "none"}
            yield {**site, **fixed, "out_channels": out_channels}, 1


def _model_sites(selection: Selection) -> Iterator[tuple[dict[str, Any], int]]:
    _refuse_dims(selection)
    for model in selection["model"]:
        sites = list(_sites_of(str(model)))
        for name in PICKS:
            _check_pick(str(model), name, selection, sites)
        kept = [
            (site, count)
            for site, count in sites
            if all(site[name] in selection.get(name, (site[name],)) for name in PICKS)
        ]
        if not kept:
            asked = {name: selection[name] for name in PICKS if name in selection}
            raise UsageError(
                f"no block of {model} has all of {_describe(asked)}: see its blocks with "
                f"'resblock-bench list -a model={model}'"
            )
        for site, count in kept:
            for dropout in selection.get("dropout", (site["dropout"],)):
                yield {**site, "dropout": dropout}, count


def _refuse_dims(selection: Selection) -> None:
    if selection.get("dims", (2,)) != (2,):
        raise UsageError("published models are two-dimensional: leave out dims, or leave out model")


def _check_pick(
    model: str, name: str, selection: Selection, sites: list[tuple[dict[str, Any], int]]
) -> None:
    """A value that no block of the model has is a mistake, not an empty filter."""
    present = sorted({site[name] for site, _ in sites})
    for value in selection.get(name, ()):
        if value not in present:
            raise UsageError(
                f"no block of {model} has {name}={value}: it is one of "
                f"{', '.join(map(str, present))}"
            )


def _sites_of(model: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The model's blocks in the order they run, those of equal shape merged."""
    counts: dict[tuple[tuple[str, Any], ...], int] = {}
    for site in resblock_sites(model):
        fields = {
            "model": model,
            "dims": 2,
            "resolution": site.h,
            "channels": site.c_in,
            "out_channels": site.c_out,
            "emb_channels": site.emb_channels,
            "conditioning": "scale_shift" if site.use_scale_shift_norm else "add",
            "dropout": site.dropout,
            "updown": site.updown,
        }
        key = tuple(fields.items())
        counts[key] = counts.get(key, 0) + site.count
    for key, count in counts.items():
        yield dict(key), count
