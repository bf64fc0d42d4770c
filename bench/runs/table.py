"""The result of a run as a table of at most 100 columns and a one-line summary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from rich.table import Table
from rich.text import Text

from resblock_bench.bench.records import Cell, Row, Status, cell_name, site_name, site_of
from resblock_bench.bench.units import counted, format_mib, format_ratio

from .folder import Run

WIDTH = 100
HEADINGS = ("block, variant", "images/s", "±", "×ref", "floor", "peak MiB", "saved MiB", "error")
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


def speed_ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """Throughput over that of the reference in the same checkpoint mode of the same site.

    None unless both are `ok`: a time that is impossible compares with nothing.
    """
    peer = next(
        (
            other
            for other in rows
            if other.axes.impl == "reference" and other.axes.checkpoint == row.axes.checkpoint
        ),
        None,
    )
    if peer is None or {peer.status, row.status} != {"ok"}:
        return None
    if peer.median_ms is None or row.median_ms is None:
        return None
    return peer.median_ms / row.median_ms


def results_table(rows: Sequence[Row]) -> Table:
    """One section a site, one line a variant."""
    table = Table(expand=False, pad_edge=False, width=None)
    table.add_column(HEADINGS[0], min_width=12, max_width=36, overflow="fold")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right", overflow="fold")
    for site, members in by_site(rows).items():
        title = f"{site_name(site)}"
        detail = f"{site.dtype} {site.layout} {site.mode}"
        count = f", {members[0].multiplicity} in the model" if site.model else ""
        table.add_section()
        table.add_row(Text(title, style="bold"))
        table.add_row(Text(f"  {detail}{count}", style="dim"))
        for row in members:
            table.add_row(*variant_line(row, members), style=_STYLES[row.status])
    return table


def variant_line(row: Row, members: Sequence[Row]) -> list[str]:
    """The cells of a row under HEADINGS; `members` are the rows of its site."""
    name = f"  {row.axes.impl} {row.axes.checkpoint}"
    error = "–"
    if row.correctness is not None:
        worst = row.correctness.errors[row.correctness.worst]
        error = "not finite" if worst is None else f"{worst:.1e}"
    if row.status != "ok" or row.throughput_images_per_s is None:
        return [name, row.status, "", "", "", "", "", error]
    if row.conditions is not None and row.conditions.disturbances:
        name += " !"
    ratio = speed_ratio(row, members)
    memory = row.memory
    return [
        name,
        f"{row.throughput_images_per_s:,.1f}",
        _half_width(row),
        "–" if ratio is None else format_ratio(ratio),
        "–" if row.floor is None or row.floor.share is None else f"{row.floor.share:.0%}",
        "–" if memory is None else format_mib(memory.peak_above_baseline_bytes),
        "–" if memory is None else format_mib(memory.saved_for_backward_bytes),
        error,
    ]


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
    found = [row for row in rows if row.conditions is not None and row.conditions.disturbances]
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
        f"{row.device_name}, {row.contract.threads} threads; torch {versions['torch']}, "
        f"triton {versions['triton']}; run {run.folder.resolve().name}"
    )


def summary(rows: Sequence[Row], planned: int | None = None) -> str:
    """Counts by status, and how each other implementation stands to the reference.

    The ratio is the geometric mean over the cells that both completed, with its range and how many
    there should be: a mean alone would hide a loss, and a hole.
    """
    counts = Counter(row.status for row in rows)
    of = f"{len(rows)} of " if planned is not None else ""
    text = f"{of}{counted(len(rows) if planned is None else planned, 'cell')}: " + (
        ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"
    )
    ratios: dict[str, list[float | None]] = {}
    for members in by_site(rows).values():
        for row in members:
            if row.axes.impl != "reference":
                ratios.setdefault(row.axes.impl, []).append(speed_ratio(row, members))
    for impl, found in ratios.items():
        values = [ratio for ratio in found if ratio is not None]
        if values:
            mean, low, high = map(format_ratio, (geometric_mean(values), min(values), max(values)))
            text += (
                f"; {impl} runs at {mean}× the reference "
                f"({low}–{high} over {len(values)} of {len(found)})"
            )
    return text + "."
