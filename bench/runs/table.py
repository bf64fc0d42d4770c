"""The result of a run as a table of at most 100 columns and a one-line summary."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from msgspec.structs import replace
from rich.table import Table
from rich.text import Text

from resblock_bench.bench.measure.floor import matrix_share
from resblock_bench.bench.records import (
    Cell,
    Ratio,
    Row,
    Status,
    cell_name,
    site_name,
    site_of,
)
from resblock_bench.bench.units import counted, format_mib, format_ratio

from .folder import Run

WIDTH = 100
_LEAST_NAME = 12  # characters of a variant's name that fit any terminal
HEADINGS = ("block, variant", "images/s", "±", "×ref ±", "floor", "peak MiB", "saved MiB", "error")
PLURALS = {"block": "blocks", "model": "whole models", "blocks": "all blocks of models"}
_STYLES: dict[Status, str] = {
    "ok": "",
    "skipped": "dim",
    "oom": "yellow",
    "timeout": "yellow",
    "failed": "red",
    "crashed": "red",
    "wrong": "bold red",
    "impossible": "bold red",
}


def by_site(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """The rows of each site, sites in order of first appearance."""
    groups: dict[Cell, list[Row]] = {}
    for row in rows:
        groups.setdefault(site_of(row.axes), []).append(row)
    return groups


def undisturbed(row: Row) -> bool:
    """Whether the machine did nothing else while the row's block was timed."""
    return row.conditions is None or not row.conditions.disturbances


def results_table(rows: Sequence[Row], width: int = WIDTH) -> Table:
    """One section a site, one line a variant; of the columns, as many as `width` has room for."""
    notes = notes_of(rows)
    lines = {id(row): variant_line(row, notes.get(row.axes)) for row in rows}
    widths = [max(map(len, column)) for column in zip(HEADINGS, *lines.values(), strict=True)][1:]
    room = [width - _LEAST_NAME - 4]
    for own in widths:
        room.append(room[-1] - own - 3)
    count = max(1, sum(left >= 0 for left in room))
    table = Table(expand=False, pad_edge=False, width=None)
    table.add_column(HEADINGS[0], min_width=_LEAST_NAME, max_width=36, overflow="fold")
    for heading in HEADINGS[1:count]:
        table.add_column(heading, justify="right", no_wrap=True)
    for site, members in by_site(rows).items():
        title = f"{site_name(site)}"
        detail = f"{site.dtype} {site.layout} {site.mode}"
        in_model = site.model is not None and site.workload == "block"
        times = f", {members[0].multiplicity} in the model" if in_model else ""
        table.add_section()
        table.add_row(Text(title, style="bold"))
        table.add_row(Text(f"  {detail}{times}", style="dim"))
        if site.layout == "nhwc":
            # Its group norm of this layout is another one from August 2026 on.
            table.add_row(Text(f"  torch {members[0].versions.get('torch')}", style="dim"))
        for row in members:
            table.add_row(*map(Text, lines[id(row)][:count]), style=_STYLES[row.status])
    return table


def notes_of(rows: Sequence[Row]) -> dict[Cell, str]:
    """Of whole models their share of the matrix rate, of all blocks that of their model's step."""
    measured = {row.axes: row for row in rows if row.status == "ok" and row.median_ms is not None}
    # A model that takes its batch in parts runs the same blocks; that which takes it whole is last.
    whole_rows = [row for cell, row in measured.items() if cell.workload == "model"]
    whole_rows.sort(key=lambda row: row.axes.microbatch is None)
    wholes = {replace(row.axes, microbatch=None): row for row in whole_rows}
    notes = {}
    for cell, row in measured.items():
        share = matrix_share(row)
        if cell.workload == "model" and share is not None:
            notes[cell] = f"MFU {share:.0%}"
        whole = wholes.get(replace(cell, workload="model"))
        if cell.workload == "blocks" and whole is not None and whole.median_ms and row.median_ms:
            notes[cell] = f"{row.median_ms / whole.median_ms:.0%} of step"
    return notes


def variant_line(row: Row, note: str | None = None) -> list[str]:
    """The cells of a row under HEADINGS, with a note behind its name."""
    name = f"  {row.axes.impl} {row.axes.checkpoint}" + (f", {note}" if note else "")
    error = "–"
    if row.correctness is not None:
        worst = row.correctness.errors[row.correctness.worst]
        error = "not finite" if worst is None else f"{worst:.1e}"
    if row.status != "ok" or row.throughput_images_per_s is None:
        return [name, row.status, "", "", "", "", "", error]
    if not undisturbed(row):
        name += " !"
    memory = row.memory
    return [
        name,
        f"{row.throughput_images_per_s:,.1f}",
        _half_width(row),
        "–" if row.ratio is None or row.axes.impl == "reference" else ratio_text(row.ratio),
        "–" if row.floor is None or row.floor.share is None else f"{row.floor.share:.0%}",
        "–" if memory is None else format_mib(memory.peak_above_baseline_bytes),
        "–" if memory is None else format_mib(memory.saved_for_backward_bytes),
        error,
    ]


def ratio_text(ratio: Ratio) -> str:
    """With half its interval, such as 1.12 ±0.03."""
    if ratio.low is None or ratio.high is None:
        return format_ratio(ratio.value)
    return f"{format_ratio(ratio.value)} ±{(ratio.high - ratio.low) / 2:.2f}"


def _half_width(row: Row) -> str:
    """Half the median's confidence interval in per cent of it."""
    if row.ci_low_ms is None or row.ci_high_ms is None or row.median_ms is None:
        return "–"
    return f"{(row.ci_high_ms - row.ci_low_ms) / 2 / row.median_ms:.0%}"


def problems(rows: Iterable[Row]) -> list[str]:
    """A line for every kind of row that has no measurement, with how often it occurred."""
    counted = Counter((row.status, row.axes.impl, row.reason) for row in rows if row.status != "ok")
    return [
        f"{status}: {impl}, {count} cell{'s' if count > 1 else ''}: {reason}"
        for (status, impl, reason), count in counted.items()
    ]


def disturbed(rows: Sequence[Row]) -> str | None:
    """How many cells were disturbed while they were timed, with an example; None if none was."""
    found = [row for row in rows if not undisturbed(row)]
    if not found:
        return None
    sentences = found[0].conditions.disturbances if found[0].conditions is not None else []
    return (
        f"! {len(found)} of {len(rows)} cells were disturbed while they were timed: "
        f"{cell_name(found[0].axes)}: {'; '.join(sentences)}"
    )


def source_of(run: Run) -> str:
    """Where the numbers are from: device, threads, versions and the run's name."""
    row, versions = run.rows[0], run.environment.versions
    return (
        f"{row.device_name}, {row.contract.threads} threads; torch {versions.get('torch')}, "
        f"triton {versions.get('triton')}; run {run.folder.resolve().name}"
    )


def summary(rows: Sequence[Row], planned: int | None = None) -> str:
    """Counts by status, and how each other implementation stands to the reference."""
    counts = Counter(row.status for row in rows)
    of = f"{len(rows)} of " if planned is not None else ""
    text = f"{of}{counted(len(rows) if planned is None else planned, 'cell')}: " + (
        ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"
    )
    return "; ".join([text, *headlines(rows)]) + "."


def headlines(rows: Sequence[Row]) -> list[str]:
    """Of every implementation but the reference its headline, of blocks and of models apart."""
    several = len({row.axes.workload for row in rows}) > 1
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.axes.impl != "reference":
            kinds.setdefault((row.axes.workload, row.axes.impl), []).append(row)
    return [
        (f"{PLURALS[workload]}: " if several else "") + headline(impl, members)
        for (workload, impl), members in kinds.items()
    ]


def headline(impl: str, rows: Sequence[Row]) -> str:
    """How many times as fast as the reference in the same mode the implementation is.

    The geometric mean over its variants that were measured and not disturbed, with the interval
    that follows from theirs, and their range: a mean alone would hide a loss, and a hole.
    """
    compared = [row for row in rows if row.ratio is not None]
    ratios = [row.ratio for row in compared if undisturbed(row) and row.ratio is not None]
    left_out = len(compared) - len(ratios)
    if not compared:
        return f"{impl} compares with no reference"
    if not ratios:
        return f"nothing is said of {impl}: all of its {len(rows)} cells were disturbed or failed"
    values = [ratio.value for ratio in ratios]
    text = f"{impl} runs at {format_ratio(geometric_mean(values))}× the reference"
    interval = mean_interval(ratios)
    if interval is not None:
        text += f", {'–'.join(map(format_ratio, interval))} with 95 %"
    reach = "–".join(map(format_ratio, (min(values), max(values))))
    text += f" ({reach} over {len(ratios)} of {counted(len(rows), 'cell')}"
    return text + (f", {left_out} disturbed ones left out)" if left_out else ")")


def mean_interval(ratios: Sequence[Ratio]) -> tuple[float, float] | None:
    """The interval of the geometric mean of independent ratios; None where one has none.

    On the log scale the half widths add up by their squares.
    """
    squares = 0.0
    for ratio in ratios:
        if ratio.low is None or ratio.high is None:
            return None
        squares += (math.log(ratio.high / ratio.low) / 2) ** 2
    mean, half = geometric_mean([r.value for r in ratios]), math.sqrt(squares) / len(ratios)
    return mean * math.exp(-half), mean * math.exp(half)
