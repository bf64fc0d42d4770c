"""The figures of a run: throughput, peak memory, and the trade between the two.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every implementation also
has its own marker. A cell that failed or ran out of memory is written out in its place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; must precede pyplot

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from resblock_bench.bench.records import Cell, Row
from resblock_bench.bench.storage import FIGURES, Run
from resblock_bench.bench.table import by_site, geometric_mean
from resblock_bench.bench.units import MIB

_COLOURS = {"reference": "#000000", "compiled": "#0072B2", "fused": "#D55E00"}
_MARKERS = {"reference": "o", "compiled": "s", "fused": "D"}
_OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OTHER_MARKERS = ("^", "v", "P", "X")
_MODE_MARKERS = {"none": "o", "selective": "s", "full": "^"}
_MODE_TITLES = {
    "none": "no checkpointing",
    "selective": "selective checkpointing",
    "full": "full checkpointing",
}
_GREY = "#595959"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "resblock-bench",  # the same data gives the same bytes
}


@dataclass(frozen=True)
class Quantity:
    """What a dot plot shows of a row; `value` is None where the row has no such number."""

    name: str
    title: str
    label: str
    value: Callable[[Row], float | None]
    interval: Callable[[Row], tuple[float, float] | None]


def _throughput_interval(row: Row) -> tuple[float, float] | None:
    if row.ci_low_ms is None or row.ci_high_ms is None:
        return None
    return row.axes.batch / row.ci_high_ms * 1e3, row.axes.batch / row.ci_low_ms * 1e3


def _peak_mib(row: Row) -> float | None:
    return row.memory.peak_above_baseline_bytes / MIB if row.memory else None


QUANTITIES = (
    Quantity(
        "throughput",
        "Throughput of one residual block",
        "images / s (log scale; more is better)",
        lambda row: row.throughput_images_per_s,
        _throughput_interval,
    ),
    Quantity(
        "memory",
        "Peak memory of one residual block, above parameters and inputs",
        "MiB (log scale; less is better)",
        _peak_mib,
        lambda row: None,
    ),
)


def draw_all(run: Run) -> list[Path]:
    """Draw every figure that the run has data for into its folder, as PNG and SVG."""
    folder = run.folder / FIGURES
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    with plt.rc_context(_STYLE):  # type: ignore[arg-type]
        figures = {quantity.name: draw_dots(run, quantity) for quantity in QUANTITIES}
        figures["front"] = draw_front(run)
        for name, figure in figures.items():
            if figure is None:
                continue
            for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, dpi=160, metadata=metadata)
                paths.append(path)
            plt.close(figure)
    return paths


def draw_dots(run: Run, quantity: Quantity) -> Figure | None:
    """One panel a checkpoint mode, one line a site, one dot an implementation.

    Beside a dot stands its ratio to the reference. None where no row has the quantity.
    """
    if all(quantity.value(row) is None for row in run.rows):
        return None
    sites = sorted(by_site(run.rows), key=_site_order)
    impls = list(dict.fromkeys(row.axes.impl for row in run.rows))
    modes = [mode for mode in _MODE_TITLES if any(r.axes.checkpoint == mode for r in run.rows)]
    lanes = len(sites) * (len(impls) + 1)
    figure, grid = plt.subplots(
        1,
        len(modes),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(2.4 + 3.1 * len(modes), 1.9 + 0.15 * lanes),
        layout="constrained",
    )
    labels = site_labels(sites)
    for mode, ax in zip(modes, grid[0], strict=True):
        ax.set_title(_MODE_TITLES[mode])
        for line, site in enumerate(sites):
            if line % 2 == 0:
                ax.axhspan(line - 0.5, line + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
            rows = [r for r in by_site(run.rows)[site] if r.axes.checkpoint == mode]
            _draw_line(ax, line, rows, impls, quantity)
        ax.set_xscale("log")
        ax.set_xlabel(quantity.label)
        ax.set_yticks(range(len(sites)), [labels[site] for site in sites])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", which="major", color="#cccccc", linewidth=0.6, zorder=0)
        ax.set_axisbelow(True)
    grid[0][0].set_ylim(len(sites) - 0.5, -0.5)
    _widen(grid[0][0])
    handles = [_handle(impl, _colour(impl, impls), _marker(impl, impls)) for impl in impls]
    _finish(figure, run, quantity.title, handles)
    return figure


def _draw_line(
    ax: Axes, line: int, rows: Sequence[Row], impls: Sequence[str], quantity: Quantity
) -> None:
    values = {row.axes.impl: quantity.value(row) for row in rows}
    for row in rows:
        impl = row.axes.impl
        height = line + (impls.index(impl) - (len(impls) - 1) / 2) / (len(impls) + 1)
        colour, value = _colour(impl, impls), values[impl]
        if value is None:
            note = "not measured" if row.status == "ok" else row.status
            ax.text(
                0.01, height, note, color=colour, va="center", fontsize=7, style="italic",
                transform=ax.get_yaxis_transform(),
            )  # fmt: skip
            continue
        interval = quantity.interval(row)
        if interval is not None:
            ax.plot(interval, [height, height], color=colour, linewidth=2, alpha=0.4)
        ax.plot(value, height, _marker(impl, impls), color=colour, markersize=5, zorder=3)
        reference = values.get("reference")
        if impl != "reference" and reference:
            ax.annotate(
                f"{value / reference:.2f}×",
                (value, height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=colour,
            )


def draw_front(run: Run) -> Figure | None:
    """Throughput against peak memory, each over that of the reference without checkpointing.

    Small points are sites, large ones the geometric mean over the sites of a variant. None where
    no site has both a reference without checkpointing and another variant.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    missing: dict[str, int] = {}
    sites = 0
    for rows in by_site(run.rows).values():
        base = next(
            (r for r in rows if (r.axes.impl, r.axes.checkpoint) == ("reference", "none")), None
        )
        if base is None or base.memory is None or base.median_ms is None or len(rows) == 1:
            continue
        sites += 1
        for row in rows:
            key = (row.axes.impl, row.axes.checkpoint)
            if row.memory is None or row.median_ms is None:
                missing[row.status] = missing.get(row.status, 0) + 1
                continue
            memory = row.memory.peak_above_baseline_bytes
            relative_memory = memory / base.memory.peak_above_baseline_bytes
            points.setdefault(key, []).append((relative_memory, base.median_ms / row.median_ms))
    if not points:
        return None
    impls = list(dict.fromkeys(row.axes.impl for row in run.rows))
    figure, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    ax.axhline(1, color=_GREY, linewidth=0.8, linestyle=":")
    ax.axvline(1, color=_GREY, linewidth=0.8, linestyle=":")
    for (impl, mode), pairs in points.items():
        colour, marker = _colour(impl, impls), _MODE_MARKERS[mode]
        xs, ys = zip(*pairs, strict=True)
        ax.scatter(xs, ys, s=16, color=colour, marker=marker, alpha=0.3, linewidths=0)
        ax.scatter(
            geometric_mean(xs),
            geometric_mean(ys),
            s=110,
            color=colour,
            marker=marker,
            edgecolors="white",
            zorder=4,
        )
    ax.set_xlabel("peak memory over the reference without checkpointing (less is better)")
    ax.set_ylabel("throughput over the reference without checkpointing (more is better)")
    ax.text(0.01, 0.99, "better", transform=ax.transAxes, va="top", color=_GREY, style="italic")
    modes = [mode for mode in _MODE_TITLES if any(key[1] == mode for key in points)]
    handles = [_handle(impl, _colour(impl, impls), "o") for impl in impls]
    handles += [_handle(_MODE_TITLES[mode], _GREY, _MODE_MARKERS[mode]) for mode in modes]
    note = f"small: each of {sites} blocks; large: geometric mean"
    if missing:
        note += "; not drawn: " + ", ".join(f"{n} {status}" for status, n in missing.items())
    _finish(figure, run, "Speed and memory of one residual block", handles, note)
    return figure


def site_labels(sites: Sequence[Cell]) -> dict[Cell, str]:
    """A label for each site that names its channels and resolution, and else only what differs."""
    extra: dict[str, Callable[[Cell], str]] = {
        "model": lambda cell: str(cell.model),
        "updown": lambda cell: "" if cell.updown == "none" else cell.updown,
        "conditioning": lambda cell: cell.conditioning,
        "dropout": lambda cell: f"p={cell.dropout:g}",
        "emb_channels": lambda cell: f"E={cell.emb_channels}",
        "batch": lambda cell: f"b{cell.batch}",
        "dtype": lambda cell: cell.dtype,
        "layout": lambda cell: cell.layout,
        "mode": lambda cell: cell.mode,
    }
    varying = [name for name in extra if len({getattr(site, name) for site in sites}) > 1]
    labels = {}
    for site in sites:
        channels = f"{site.channels}"
        if site.out_channels != site.channels:
            channels += f"→{site.out_channels}"
        parts = [f"{channels}, {site.resolution}{'¹²³'[site.dims - 1]}"]
        parts += [text for name in varying if (text := extra[name](site))]
        labels[site] = ", ".join(parts)
    return labels


def _site_order(site: Cell) -> tuple[object, ...]:
    return (
        site.mode, site.dtype, site.layout, str(site.model), -site.resolution, site.channels,
        site.out_channels, site.updown, site.batch,
    )  # fmt: skip


def _widen(ax: Axes) -> None:
    """Room for the ratios on the right, and plain numbers on a log axis."""
    low, high = ax.get_xlim()
    span = math.log10(high / low)
    ax.set_xlim(low, high * 10 ** (0.22 * max(span, 0.5)))
    few = span < 1.5
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _colour(impl: str, impls: Sequence[str]) -> str:
    others = [name for name in impls if name not in _COLOURS]
    return _COLOURS.get(impl) or _OTHER_COLOURS[others.index(impl) % len(_OTHER_COLOURS)]


def _marker(impl: str, impls: Sequence[str]) -> str:
    others = [name for name in impls if name not in _MARKERS]
    return _MARKERS.get(impl) or _OTHER_MARKERS[others.index(impl) % len(_OTHER_MARKERS)]


def _handle(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=label)


def _finish(figure: Figure, run: Run, title: str, handles: list[Line2D], note: str = "") -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.supxlabel(_caption(run, note), x=0.01, ha="left", fontsize=7, color=_GREY)


def _caption(run: Run, note: str) -> str:
    """Where the numbers are from; what all rows share and the labels therefore leave out."""
    cells = [row.axes for row in run.rows]
    shared = []
    for name in ("model", "mode", "dtype", "layout", "batch"):
        values = {getattr(cell, name) for cell in cells}
        if len(values) == 1 and (value := values.pop()) is not None:
            shared.append(f"batch {value}" if name == "batch" else str(value))
    versions = run.environment.versions
    source = (
        f"{run.rows[0].device_name}, {run.rows[0].contract.threads} threads; "
        f"torch {versions['torch']}, triton {versions['triton']}; run {run.folder.resolve().name}"
    )
    return "\n".join(filter(None, ["; ".join(filter(None, [", ".join(shared), note])), source]))
