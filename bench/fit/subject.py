"""What is planned: a published model, one of a TOML file or of diffusers, or a residual block.

A TOML file has the fields of `reference.UNetConfig` at its top:

    family = "unet"
    image_size = 64
    model_channels = 96
    channel_mult = [1, 2, 4]
    num_res_blocks = 2
    attention_resolutions = [16, 8]
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec
import torch
from msgspec import Struct

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError, shortened, unknown
from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.measure import diffusers_model
from resblock_bench.bench.measure.networks import zero_inputs
from resblock_bench.bench.records import Cell, site_name
from resblock_bench.reference import PUBLISHED, UNetConfig, build
from resblock_bench.reference.configs import Family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE_BYTES = 2**20
_BOUNDS = {
    "image_size": 8192,
    "model_channels": 65536,
    "num_res_blocks": 64,
    "in_channels": 65536,
    "out_channels": 2**20,
    "num_classes": 2**24,
    "augment_dim": 2**20,
}
"""Above these nobody trains; far above, sizes no longer fit 64 bits or nothing ends."""
_LEVELS = 12
_CHANNELS, _RESOLUTION = 65536, 8192
_OTHER_AXES = (
    *("workload", "batch", "microbatch", "dtype", "mode", "checkpoint", "impl", "layout"),
)


class Subject(Struct, frozen=True, kw_only=True):
    """A model, one of diffusers by its config.json, or a block: one of the three."""

    name: str
    config: UNetConfig | None = None
    diffusers: diffusers_model.Config | None = None
    cell: Cell | None = None


def read_subject(given: str | None, axes: Sequence[str]) -> Subject:
    """The subject that the command line names. Raises UsageError."""
    if given is not None and axes:
        raise UsageError(
            f"{given!r} and -a were both given: name a model, or a block by its axes, not both"
        )
    if axes:
        return _block(axes)
    if given is None:
        raise UsageError(
            "nothing to plan: name a published model (see 'resblock-bench list'), a TOML file of "
            "UNetConfig's fields, a config.json of diffusers, or a block by -a channels=256 -a "
            "resolution=64"
        )
    if given in PUBLISHED:
        return Subject(name=given, config=PUBLISHED[given])
    path = Path(given)
    if path.suffix == ".json":
        config = diffusers_model.read_config(given)
        return Subject(name=f"{config['_class_name']} of {shortened(given)}", diffusers=config)
    if path.suffix == ".toml":
        return Subject(name=path.stem, config=_checked(_read_config(path), given))
    if path.exists():
        raise UsageError(
            f"{given} is no TOML file and no config.json by its name: write UNetConfig's fields "
            "into one that ends in .toml, or name one of diffusers that ends in .json"
        )
    raise unknown("published model", given, PUBLISHED)


def _read_config(path: Path) -> UNetConfig:
    try:
        content = files.read(path, _FILE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from None
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # of tomllib, and of Python's own limits
        raise UsageError(f"{path} is not valid TOML: {error}; mend that line") from None
    fields = dataclasses.fields(UNetConfig)
    for key in table:
        if key not in [field.name for field in fields]:
            raise unknown(f"key in {path}:", key, [field.name for field in fields])
    families = get_args(Family)
    if isinstance(family := table.get("family"), str) and family not in families:
        raise unknown(f"family in {path}:", family, families)
    # The checks of a config read all of its fields, which msgspec sets only where they are given.
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    try:
        return msgspec.convert({**defaults, **table}, UNetConfig)
    except msgspec.ValidationError as error:
        problem = str(error).replace("Object missing", "the file lacks").replace("`$.", "`")
        raise UsageError(f"{path}: {problem}; mend that field") from None


def _checked(config: UNetConfig, source: str) -> UNetConfig:
    """A model that can be built and run. Raises UsageError."""
    for name, most in _BOUNDS.items():
        value = getattr(config, name)
        if value is not None and value > most:
            raise UsageError(f"{source}: {name} is {value}, and at most {most} is planned")
    if len(config.channel_mult) > _LEVELS:
        raise UsageError(
            f"{source}: channel_mult has {len(config.channel_mult)} levels, and at most {_LEVELS} "
            "are planned"
        )
    if max(config.widths) > _CHANNELS:
        raise UsageError(
            f"{source}: a level has {max(config.widths)} channels, and at most {_CHANNELS} are "
            "planned"
        )
    try:
        with torch.device("meta"):
            inputs = zero_inputs(config, 1)
            del inputs["target"]
            build(config)(**inputs)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{source} describes no model that runs: {error}") from None
    return config


def _block(axes: Sequence[str]) -> Subject:
    selection = parse_arguments(axes)
    for name in _OTHER_AXES:
        if name in selection:
            raise UsageError(
                f"-a {name} is no axis of a block that is planned: its training steps are in NCHW, "
                "and the rest is said by --batch, --dtype, --impl and --checkpoint"
            )
    cells = [item.cell for item in plan([selection])]
    sites = list(dict.fromkeys(msgspec.structs.replace(cell, impl="reference") for cell in cells))
    if len(sites) > 1:
        raise UsageError(
            f"the axes select {len(sites)} blocks, and plan takes one: give each axis one value"
        )
    (cell,) = sites
    if max(cell.channels, cell.out_channels, cell.emb_channels) > _CHANNELS:
        raise UsageError(f"a block of more than {_CHANNELS} channels is not planned: give fewer")
    if cell.resolution**cell.dims > _RESOLUTION**2:
        raise UsageError(
            f"a block of more than {_RESOLUTION}² positions is not planned: give a smaller "
            "resolution"
        )
    name = site_name(msgspec.structs.replace(cell, batch=1)).replace(" b1", "", 1)
    return Subject(name=name, cell=cell)
