"""The commands that measure again what a page shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resblock_bench.bench.errors import InvalidError, UsageError, command
from resblock_bench.bench.grid.axes import axes
from resblock_bench.bench.grid.grid import PICKS, plan
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.grid.presets import Preset, choose, presets
from resblock_bench.bench.records import Cell, Row
from resblock_bench.bench.runs.folder import config_file


def command_of_run(of: Plan, folder: Path) -> str | None:
    """The command that measures the same cells, by a preset or by axes; None where there is none.

    folder   of the run, in which models of diffusers have their config.json

    With what options set of the rule; the rest of it is that of the version which measures.
    """
    for preset in presets().values():
        if preset.device in (None, of.device) and _cells(preset) == {c.cell for c in of.cells}:
            return command("run", "--preset", preset.name, *_options(of, preset))
    arguments = _arguments([item.cell for item in of.cells], folder)
    if not arguments:
        return None
    try:
        selection = choose(arguments, None, None, of.device)
    except (UsageError, InvalidError):  # values that no axis takes here
        return None
    if _cells(selection) != {item.cell for item in of.cells}:
        return None
    return command("run", *_given(arguments), *_options(of, selection))


def command_of_cell(row: Row, folder: Path) -> str:
    """The command that measures the cell of a row alone; `folder` is that of its run."""
    options = ["--device", row.contract.device]
    if row.seed:
        options += ["--seed", str(row.seed)]
    return command("run", *_given(_arguments([row.axes], folder)), *options)


def _cells(preset: Preset) -> set[Cell]:
    try:
        return {item.cell for item in plan(preset.grids)}
    except UsageError:
        return set()


def _options(of: Plan, preset: Preset) -> list[str]:
    rule = preset.settings.rule()
    options = ["--device", of.device]
    if of.rule.max_time_s != rule.max_time_s:
        options += ["--max-time", f"{of.rule.max_time_s:g}s"]
    if of.rule.min_samples == of.rule.max_samples:
        options += ["--samples", str(of.rule.min_samples)]
    if of.seed:
        options += ["--seed", str(of.seed)]
    if of.threads is not None:
        options += ["--threads", str(of.threads)]
    return options


def _given(arguments: Sequence[str]) -> list[str]:
    return [word for argument in arguments for word in ("-a", argument)]


def _arguments(cells: Sequence[Cell], folder: Path) -> list[str]:
    """The values that the cells have on each axis, but for those that are the default."""
    found = []
    whole = all(cell.workload != "block" for cell in cells)
    for axis in axes().values():
        if whole and axis.name in PICKS:  # of a model they are its own
            continue
        values = tuple(dict.fromkeys(_value(cell, axis.name, folder) for cell in cells))
        as_many = axis.name == "out_channels" and all(c.out_channels == c.channels for c in cells)
        of_model = axis.name == "dropout" and all(cell.model for cell in cells)
        if values and values not in (axis.default, (None,)) and not as_many and not of_model:
            found.append(f"{axis.name}={','.join(map(str, values))}")
    return found


def _value(cell: Cell, axis: str, folder: Path) -> Any:
    if axis == "model" and cell.config is not None:
        return folder / config_file(cell)
    return getattr(cell, axis)
