"""Presets and configuration files: settings and a list of grids, in TOML, strictly validated.

    description = "one line"
    device = "cpu"                  # optional

    [settings]                      # optional; every key is a field of Settings
    max_time = "1s"

    [[grid]]                        # one or more; every key is an axis
    channels = [128, 256]
    resolution = "[8:32:x2]"
    impl = "reference,fused"

The grids stand in order of value: a time budget is spent from the top.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.timing import DEFAULT_RULE
from resblock_bench.bench.records import Rule
from resblock_bench.bench.units import parse_duration_s

from .axes import Selection, parse_arguments, parse_values

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS_FILE = Path(__file__).with_name("presets.toml")


class Settings(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """How cells are timed; None keeps what timing.DEFAULT_RULE has."""

    warmup: str | None = None
    warmup_max: str | None = None
    max_time: str | None = None
    min_samples: Annotated[int, Meta(ge=1)] | None = None
    max_samples: Annotated[int, Meta(ge=1)] | None = None
    rel_half_width: Annotated[float, Meta(gt=0)] | None = None

    def rule(self) -> Rule:
        """The stop rule with these settings applied; raises UsageError for a bad duration."""
        changes: dict[str, Any] = {
            "warmup_s": self.warmup and parse_duration_s(self.warmup),
            "warmup_max_s": self.warmup_max and parse_duration_s(self.warmup_max),
            "max_time_s": self.max_time and parse_duration_s(self.max_time),
            "min_samples": self.min_samples,
            "max_samples": self.max_samples,
            "rel_half_width": self.rel_half_width,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        rule = msgspec.structs.replace(DEFAULT_RULE, **given)
        if rule.min_samples > rule.max_samples:
            raise UsageError(
                f"min_samples={rule.min_samples} is above max_samples={rule.max_samples}: "
                "raise the one or lower the other"
            )
        return rule


class _File(Struct, forbid_unknown_fields=True):
    grid: Annotated[list[dict[str, object]], Meta(min_length=1)]
    description: str = ""
    device: Kind | None = None
    settings: Settings = msgspec.field(default_factory=Settings)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named or loaded sweep. `device` None runs on either."""

    name: str
    description: str
    device: Kind | None
    settings: Settings
    grids: tuple[Selection, ...]

    def overridden(self, selection: Selection) -> "Preset":
        """The preset with the axes of `selection` replaced in each of its grids."""
        grids = tuple({**grid, **selection} for grid in self.grids)
        return dataclasses.replace(self, grids=grids)


def presets() -> dict[str, Preset]:
    """The presets that the package brings, by name."""
    tables = tomllib.loads(PRESETS_FILE.read_text(encoding="utf-8"))
    return {
        name: _validated(name, table, f"{PRESETS_FILE.name}: {name}")
        for name, table in tables.items()
    }


def named(name: str) -> Preset:
    """One of the package's presets."""
    known = presets()
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


def load(path: Path) -> Preset:
    """The preset in a TOML file; errors name the file and the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}; mend that line") from None
    return _validated(path.stem, table, str(path))


def choose(
    arguments: Sequence[str], preset: str | None, config: Path | None, device: Kind
) -> Preset:
    """The sweep that the command line asks for.

    A preset or a file, its axes replaced by `arguments`; `arguments` alone over the axes'
    defaults; the device's own preset where nothing is given.
    """
    if preset is not None and config is not None:
        raise UsageError("--preset and --config were both given: a sweep has one source, drop one")
    selection = parse_arguments(arguments)
    if config is not None:
        return load(config).overridden(selection)
    if preset is not None or not selection:
        return named(preset or device).overridden(selection)
    return Preset("selection", "", None, Settings(), (selection,))


def _validated(name: str, table: dict[str, Any], source: str) -> Preset:
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        problem = str(error).replace("`$.", "`").replace("Object", "the table")
        raise UsageError(f"{source}: {problem}; see 'resblock-bench run --help'") from None
    grids = []
    for position, grid in enumerate(file.grid):
        selection = {}
        for axis, values in grid.items():
            try:
                selection[axis] = parse_values(axis, values)
            except UsageError as error:
                raise UsageError(f"{source}: grid[{position}].{axis}: {error}") from None
        grids.append(selection)
    try:
        file.settings.rule()
    except UsageError as error:
        raise UsageError(f"{source}: settings: {error}") from None
    return Preset(name, file.description, file.device, file.settings, tuple(grids))
