"""Presets and configuration files: settings and a list of grids, in TOML, strictly validated.

    description = "one line"
    device = "cpu"                  # optional

    [settings]                      # optional; every key is a field of Settings
    max_time = "1s"

    [[grid]]                        # one or more; every key is an axis
    channels = [128, 256]
    resolution = "[8:32:x2]"
    impl = "reference,fused"

The grids stand in order of value: a time budget is spent from the top. A file may hold several
sweeps, each below its name: `[NAME]`, `[NAME.settings]`, `[[NAME.grid]]`, like presets.toml.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from resblock_bench.bench import files
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
_CONFIG_BYTES = 1 << 20


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
            "warmup_s": _seconds(self.warmup),
            "warmup_max_s": _seconds(self.warmup_max),
            "max_time_s": _seconds(self.max_time),
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


def _seconds(duration: str | None) -> float | None:
    return None if duration is None else parse_duration_s(duration)


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
    return read_presets(PRESETS_FILE)


def named(name: str) -> Preset:
    """One of the package's presets."""
    return _one_of(presets(), name)


def _one_of(known: Mapping[str, Preset], name: str) -> Preset:
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


def read_presets(path: Path) -> dict[str, Preset]:
    """The sweeps in a TOML file by name, that of the file where it holds one without a name.

    Raises UsageError, naming the file and the key.
    """
    try:
        content = files.read(path, _CONFIG_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}; mend that line") from None
    try:
        table = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # of tomllib, and of Python's own limits
        raise UsageError(f"{path} is not valid TOML: {error}; mend that line") from None
    if _holds_named(table):
        return {name: _validated(name, sweep, f"{path}: {name}") for name, sweep in table.items()}
    return {path.stem: _validated(path.stem, table, str(path))}


def _holds_named(table: Mapping[str, object]) -> bool:
    """Whether a file has sweeps below their names, rather than the keys of one."""
    keys = table.keys() & set(_File.__struct_fields__)
    return bool(table) and not keys and all(isinstance(value, dict) for value in table.values())


def load(path: Path, name: str | None = None, device: Kind | None = None) -> Preset:
    """The sweep in a TOML file: of several the one that is named, or else that of the device."""
    found = read_presets(path)
    if name is not None:
        return _one_of(found, name)
    if len(found) == 1:
        return next(iter(found.values()))
    if device is not None and device in found:
        return found[device]
    raise UsageError(
        f"{path} holds {len(found)} sweeps: name one with --preset: {', '.join(found)}"
    )


def choose(
    arguments: Sequence[str], preset: str | None, config: Path | None, device: Kind
) -> Preset:
    """The sweep that the command line asks for.

    A preset, or that of a file, its axes replaced by `arguments`; `arguments` alone over the axes'
    defaults; the device's own preset where nothing is given.
    """
    selection = parse_arguments(arguments)
    if config is not None:
        return load(config, preset, device).overridden(selection)
    if preset is not None or not selection:
        return named(preset or device).overridden(selection)
    return Preset("selection", "", None, Settings(), (selection,))


def _validated(name: str, table: dict[str, Any], source: str) -> Preset:
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        problem = str(error).replace("`$.", "`").replace("Object", "the table")
        raise UsageError(f"{source}: {problem}; docs/measuring.md has an example") from None
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
