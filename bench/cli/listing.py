"""What `list`, `run --dry-run` and `env` show: choices, the cells of a selection, the machine."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from resblock_bench.bench.errors import first_line
from resblock_bench.bench.grid.axes import axes, models
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.grid.presets import presets
from resblock_bench.bench.machine.checkup import Fact
from resblock_bench.bench.measure.devices import default_kind
from resblock_bench.bench.measure.implementations import IMPLEMENTATIONS, module_offering
from resblock_bench.bench.measure.predict_memory import unpredictable
from resblock_bench.bench.measure.scaled_memory import ScaledMemory
from resblock_bench.bench.progress import counted as counted_tasks
from resblock_bench.bench.records import Cell, Environment, Memory, cell_name
from resblock_bench.bench.units import counted, format_bytes, format_mib
from resblock_bench.reference import PUBLISHED, resblock_sites

NAME_WIDTH = 16
"""Columns that are left to names on a terminal however narrow."""
_MANY = 50


def choices() -> RenderableType:
    """Presets, axes with their values, implementations and models."""
    return Group(_presets(), "", _axes(), "", _implementations(), "", _models())


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _presets() -> Table:
    table = _table("presets (--preset NAME)", "name", "device", "what it measures")
    for preset in presets().values():
        table.add_row(preset.name, preset.device or "any", preset.description)
    return table


def _axes() -> Table:
    table = _table("axes (-a NAME=VALUES)", "name", "default", "values")
    for axis in axes().values():
        default = ",".join(map(str, axis.default)) or "–"
        allowed = "see below" if axis.name == "model" else axis.allowed()
        table.add_row(axis.name, default, f"{axis.help}: {allowed}")
    return table


def _implementations() -> Table:
    title = "implementations (-a impl=NAMES)"
    table = _table(title, "name", "usable here", "what it is, and what it is made for")
    device = default_kind()
    for name, implementation in IMPLEMENTATIONS.items():
        reason = implementation.unusable(device)
        lines = [implementation.description]
        if module_offering(name) is None:
            lines.append(str(implementation.can))
        if reason is not None:
            lines.append(f"no: {reason}")
        usable = f"on {device}" if reason is None else "no"
        table.add_row(*map(Text, (name, usable, "\n".join(lines))))
    return table


def _models() -> Table:
    table = _table("published models (-a model=NAMES)", "name", "image size", "residual blocks")
    for name, config in PUBLISHED.items():
        count = str(sum(site.count for site in resblock_sites(name)))
        if name not in models():
            count += ", with workload=model or blocks only"
        table.add_row(name, str(config.image_size), count)
    return table


def planned_cells(planned: Sequence[PlannedCell], progress: Console) -> tuple[RenderableType, bool]:
    """The cells with the bytes that one step of each is predicted to need, and whether these are
    all: Ctrl-C ends the predictions, and shows what there is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", overflow="fold", min_width=NAME_WIDTH)
    for heading in ("×model", "peak MiB", "above base", "saved"):
        table.add_column(heading, justify="right")
    largest: int | None = None
    unpredicted: Counter[tuple[str, str]] = Counter()
    predictions = ScaledMemory(item.cell for item in planned)
    with suppress(KeyboardInterrupt), _counted(progress, len(planned)) as advance:
        for item in planned:
            memory, reason = _predicted(predictions, item.cell)
            numbers = ["–", "–", "–"]
            if reason is not None:
                unpredicted[item.cell.impl, reason] += 1
            if memory is not None:
                largest = max(largest or 0, memory.peak_bytes)
                numbers = [
                    format_mib(memory.peak_bytes),
                    format_mib(memory.peak_above_baseline_bytes),
                    format_mib(memory.saved_for_backward_bytes),
                ]
            one_of_many = item.cell.model is not None and item.cell.workload == "block"
            count = str(item.multiplicity) if one_of_many else ""
            table.add_row(Text(cell_name(item.cell)), count, *numbers)
            advance()
    notes = [
        f"no prediction for {impl} ({counted(count, 'cell')}): {reason}"
        for (impl, reason), count in unpredicted.items()
    ]
    done, total = table.row_count, len(planned)
    text = counted(total, "cell") if done == total else f"interrupted after {done} of {total} cells"
    if largest is not None:
        text += f"; the largest is predicted to need {format_bytes(largest)}"
    return Group(table, *map(Text, [*notes, f"{text}."])), done == total


def _counted(progress: Console, total: int) -> AbstractContextManager[Callable[[], None]]:
    """Of a list that is there at once no progress is shown."""
    if total < _MANY:
        return nullcontext(lambda: None)
    return counted_tasks(progress, "predicting memory", total)


def _predicted(predictions: ScaledMemory, cell: Cell) -> tuple[Memory | None, str | None]:
    """The memory of a cell, or why there is no prediction."""
    try:
        return predictions.memory(cell), unpredictable(cell)
    except Exception as error:  # an implementation's; the list is of use without it
        return None, first_line(error)


def machine(found: Environment, facts: Sequence[Fact]) -> RenderableType:
    """The environment as a run would record it, then what would spoil a measurement."""
    shown = _table("environment")
    shown.add_column()
    shown.add_column(overflow="fold")
    for name, value in msgspec.to_builtins(found).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items() if version)
        shown.add_row(name, Text("unknown or absent" if value is None else str(value)))
    checks = _table("before trusting a measurement")
    checks.add_column()
    checks.add_column(overflow="fold")
    for fact in facts:
        text = Text(fact.found)
        if fact.advice is not None:
            text.append(f"\n{fact.advice}", style="yellow")
        if fact.command is not None:
            text.append(f"\n$ {fact.command}", style="bold")
        checks.add_row(fact.topic, text)
    count = sum(fact.advice is not None for fact in facts)
    return Group(shown, "", checks, "", f"{count} to mend." if count else "Nothing to mend.")
