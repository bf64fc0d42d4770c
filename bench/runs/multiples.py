"""A sweep over resolutions and channels: panels with the resolution on the x axis, and a line for
each channel count.

A panel a checkpoint mode; a line's colour is its channels, its dashes and marker the
implementation. Where memory ran out a line goes on, dotted, to a × at the wall.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from resblock_bench.bench.records import Cell, Row
from resblock_bench.bench.units import MIB, format_bytes

from .folder import Run
from .quantities import Quantity, is_expected, note_of, subject_of, walls
from .style import GREY, MODE_TITLES, finish, marker_of, plain_log

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_LINES: dict[str, Callable[[Cell], str]] = {
    "dims": lambda cell: f"{cell.dims}D",
    "conditioning": lambda cell: cell.conditioning,
    "batch": lambda cell: f"b{cell.batch}",
}
"""Axes that may differ between lines of the same channels."""
Series = tuple[int, int, str]


def is_grid(run: Run) -> bool:
    """Whether the rows are of no model and differ in resolution."""
    cells = [row.axes for row in run.rows]
    return all(c.model is None for c in cells) and len({c.resolution for c in cells}) > 1


def draw_multiples(run: Run, quantity: Quantity) -> Figure | None:
    """The panels of one quantity; None where no row has it."""
    if all(quantity.of(row) is None for row in run.rows):
        return None
    wall = walls(run) if quantity.has_wall else {}
    impls = list(dict.fromkeys(row.axes.impl for row in run.rows))
    modes = [mode for mode in MODE_TITLES if any(r.axes.checkpoint == mode for r in run.rows)]
    cells = [row.axes for row in run.rows]
    differing = [n for n in _LINES if len({getattr(cell, n) for cell in cells}) > 1]

    def series_of(cell: Cell) -> Series:
        """What a line stands for."""
        rest = ", ".join(_LINES[name](cell) for name in differing)
        return cell.channels, cell.out_channels, rest

    series = sorted(set(map(series_of, cells)))
    colours = dict(zip(series, _shades(len(series)), strict=True))
    resolutions = sorted({row.axes.resolution for row in run.rows})
    figure, grid = plt.subplots(
        1,
        len(modes),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(2.4 + 2.9 * len(modes), 4.4),
        layout="constrained",
    )
    for mode, ax in zip(modes, grid[0], strict=True):
        for i, one in enumerate(series):
            for j, impl in enumerate(impls):
                shift = 0.04 * (len(impls) * i + j - (len(impls) * len(series) - 1) / 2)
                rows = [
                    row
                    for row in run.rows
                    if (row.axes.checkpoint, row.axes.impl) == (mode, impl)
                    and series_of(row.axes) == one
                ]
                _draw_line(ax, rows, impls, colours[one], quantity, wall, shift)
        ax.set_title(MODE_TITLES[mode])
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("resolution")
        ax.xaxis.set_major_locator(FixedLocator(resolutions))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(which="major", color="#cccccc", linewidth=0.6)
        ax.set_axisbelow(True)
        if wall:
            _draw_wall(ax, min(wall.values()), max(wall.values()))
    plain_log(grid[0][0].yaxis, *grid[0][0].get_ylim())
    grid[0][0].set_ylabel(quantity.label)
    finish(
        figure, run, f"{quantity.title} {subject_of(run)}", _legend(impls, colours),
        note_of(run, quantity, wall),
        beside=True,
    )  # fmt: skip
    return figure


def _draw_line(
    ax: Axes,
    rows: Sequence[Row],
    impls: Sequence[str],
    colour: str,
    quantity: Quantity,
    wall: Mapping[Cell, float],
    shift: float,
) -> None:
    """`shift` moves a × aside, so that those of several lines are seen."""
    points, beyond = [], []
    for row in sorted(rows, key=lambda row: row.axes.resolution):
        value, resolution = quantity.of(row), row.axes.resolution
        if row.axes in wall:
            beyond.append((resolution * 2**shift, wall[row.axes]))
            pale = 0.4 if is_expected(row) else 1.0
            ax.plot(*beyond[-1], "x", color=colour, alpha=pale, markeredgewidth=2, zorder=3)
        if value is None:
            continue
        points.append((resolution, value))
        interval = quantity.interval(row)
        if interval is not None:
            ax.plot([resolution] * 2, interval, color=colour, linewidth=2, alpha=0.4)
        face = "white" if quantity.doubtful(row) else colour
        marker = marker_of(row.axes.impl, impls)
        ax.plot(*points[-1], marker, color=colour, markerfacecolor=face, markersize=4.5, zorder=3)
    if points:
        dashes = _DASHES[impls.index(rows[0].axes.impl) % len(_DASHES)]
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, linestyle=dashes)
    if points and beyond:
        ax.plot(
            *zip(points[-1], beyond[0], strict=True), color=colour, linewidth=0.8, linestyle=":"
        )


def _draw_wall(ax: Axes, low: float, high: float) -> None:
    """A line at the limit, the lowest if they differ."""
    texts = [format_bytes(int(limit * MIB)) for limit in (low, high)]
    label = f"{texts[0]}, the limit" if low == high else f"{texts[0]} to {texts[1]}, the limits"
    ax.axhline(low, color=GREY, linewidth=1.2, zorder=1)
    ax.annotate(
        label, (0.02, low), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", fontsize=7, color=GREY,
    )  # fmt: skip


def _legend(impls: Sequence[str], colours: Mapping[Series, str]) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            color=GREY,
            linestyle=_DASHES[i % len(_DASHES)],
            marker=marker_of(impl, impls),
            markersize=4.5,
            label=impl,
        )
        for i, impl in enumerate(impls)
    ]
    return handles + [
        Line2D([], [], color=colour, linewidth=3, label=_label(one))
        for one, colour in colours.items()
    ]


def _label(series: Series) -> str:
    channels, out, rest = series
    text = f"{channels}" if out == channels else f"{channels}→{out}"
    return f"{text} channels" + (f", {rest}" if rest else "")


def _shades(count: int) -> list[str]:
    """From dark to light, so that more channels are seen to be more."""
    shades = plt.get_cmap("viridis")
    return [to_hex(shades(0.85 * i / max(1, count - 1))) for i in range(count)]
