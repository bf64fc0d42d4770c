"""Dot plots of one quantity: a panel a checkpoint mode, a line a site, a dot an implementation.

A cell without a number has its status written in its place. Where the memory is drawn, one that ran
out of it stands as a × at the wall: the limit that it ran into. The limit is on everything that a
cell allocates, while the axis leaves out parameters and inputs, so a × says that the cell wanted
more than the limit less those.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resblock_bench.bench.records import Cell, Row
from resblock_bench.bench.units import MIB, format_bytes

from .folder import Run
from .quantities import Quantity, is_expected, note_of, subject_of, walls
from .style import GREY, MODE_TITLES, colour_of, finish, handle, marker_of, plain_log, site_labels
from .table import by_site


def draw_dots(run: Run, quantity: Quantity) -> Figure | None:
    """One panel a checkpoint mode, one line a site, one dot an implementation.

    Beside a dot stands its ratio to the reference. What was measured on a disturbed machine is
    hollow, and has none. None where no row has the quantity.
    """
    if all(quantity.of(row) is None for row in run.rows):
        return None
    wall = walls(run) if quantity.has_wall else {}
    members = by_site(run.rows)
    sites = sorted(members, key=_site_order)
    impls = list(dict.fromkeys(row.axes.impl for row in run.rows))
    modes = [mode for mode in MODE_TITLES if any(r.axes.checkpoint == mode for r in run.rows)]
    lanes = len(sites) * (len(impls) + 1)
    figure, grid = plt.subplots(
        1,
        len(modes),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(2.2 + 3.0 * len(modes), 1.7 + 0.15 * lanes),
        layout="constrained",
    )
    labels = site_labels(sites)
    for mode, ax in zip(modes, grid[0], strict=True):
        ax.set_title(MODE_TITLES[mode])
        for line, site in enumerate(sites):
            if line % 2 == 0:
                ax.axhspan(line - 0.5, line + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
            rows = [r for r in members[site] if r.axes.checkpoint == mode]
            _draw_line(ax, line, rows, impls, quantity, wall)
        ax.set_xscale("log")
        ax.set_xlabel(quantity.label)
        ax.set_yticks(range(len(sites)), [labels[site] for site in sites])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", which="major", color="#cccccc", linewidth=0.6, zorder=0)
        ax.set_axisbelow(True)
    grid[0][0].set_ylim(len(sites) - 0.5, -0.5)
    handles = [handle(impl, colour_of(impl, impls), marker_of(impl, impls)) for impl in impls]
    if wall:
        _draw_wall(grid[0], len(sites), wall.values())
    note = note_of(run, quantity, wall)
    _widen(grid[0][0])
    finish(figure, run, f"{quantity.title} {subject_of(run)}", handles, note)
    return figure


def _draw_wall(panels: Sequence[Axes], count: int, limits: Collection[float]) -> None:
    """A line at the limit, the lowest if they differ; its label in a strip under the last site."""
    low, high = (format_bytes(int(find(limits) * MIB)) for find in (min, max))
    label = f"{low}, the limit" if low == high else f"{low} to {high}, the limits"
    panels[0].set_ylim(count + 0.1, -0.5)  # shared by all panels
    for ax in panels:
        ax.axvline(min(limits), color=GREY, linewidth=1.2, zorder=1)
        ax.annotate(
            label,
            (min(limits), count - 0.2),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            color=GREY,
        )


def _draw_line(
    ax: Axes,
    line: int,
    rows: Sequence[Row],
    impls: Sequence[str],
    quantity: Quantity,
    wall: Mapping[Cell, float],
) -> None:
    reference = next((row for row in rows if row.axes.impl == "reference"), None)
    for row in rows:
        impl = row.axes.impl
        height = line + (impls.index(impl) - (len(impls) - 1) / 2) / (len(impls) + 1)
        colour, value = colour_of(impl, impls), quantity.of(row)
        if row.axes in wall:
            pale = 0.4 if is_expected(row) else 1.0
            ax.plot(
                wall[row.axes], height, "x", color=colour, alpha=pale, markersize=6,
                markeredgewidth=2, zorder=3,
            )  # fmt: skip
            continue
        if value is None:
            note = "not measured" if row.status == "ok" else row.status
            ax.text(
                0.01, height, note, color=colour, va="center", fontsize=7, style="italic",
                transform=ax.get_yaxis_transform(),
            )  # fmt: skip
            continue
        interval = quantity.interval(row) or (value, value)
        ax.plot(interval, [height, height], color=colour, linewidth=2, alpha=0.4)
        face = "white" if quantity.doubtful(row) else colour
        ax.plot(
            value, height, marker_of(impl, impls), color=colour, markerfacecolor=face, markersize=5,
            zorder=3,
        )  # fmt: skip
        ratio = None if impl == "reference" else quantity.ratio(row, reference)
        if ratio is not None:
            ax.annotate(
                ratio,
                (max(value, interval[1]), height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=colour,
            )


def _site_order(site: Cell) -> tuple[object, ...]:
    return (
        site.workload, site.mode, site.dtype, site.layout, str(site.model), -site.resolution,
        site.channels, site.out_channels, site.updown, site.batch, site.microbatch or 0,
    )  # fmt: skip


def _widen(ax: Axes) -> None:
    """Room for the ratios on the right."""
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * 10 ** (0.3 * max(math.log10(high / low), 0.5)))
    plain_log(ax.xaxis, low, high)
