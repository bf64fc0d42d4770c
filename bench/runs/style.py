"""What the figures share: colours and markers, labels of sites, title, legend and caption.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every implementation and
every checkpoint mode also has a marker of its own.
"""

import contextlib
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence

import matplotlib

matplotlib.use("Agg")  # files only; must precede pyplot

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from resblock_bench.bench.records import Cell
from resblock_bench.bench.terminal import visible

from .folder import Run
from .table import source_of

COLOURS = {"reference": "#000000", "compiled": "#0072B2", "fused": "#D55E00"}
MARKERS = {"reference": "o", "compiled": "s", "fused": "D"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
OTHER_MARKERS = ("^", "v", "P", "X")
MODE_MARKERS = {"none": "o", "selective": "s", "full": "^"}
MODE_TITLES = {
    "none": "no checkpointing",
    "selective": "selective checkpointing",
    "full": "full checkpointing",
}
GREY = "#595959"
_CAPTION_CHARACTERS = 17  # that fit an inch of the caption's type
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "resblock-bench",  # the same data gives the same bytes
    "text.parse_math": False,  # a `$` in a name is one
    "text.usetex": False,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Figures that are drawn in the block have the STYLE."""
    with plt.rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        # A run or a processor may have a name in any script: a box stands where the font has none.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def site_labels(sites: Sequence[Cell]) -> dict[Cell, str]:
    """Two lines a site: channels or model, and resolution; then what else differs between sites.

    What differs only because the model does is left to the model's name.
    """
    extra: dict[str, Callable[[Cell], str]] = {
        "model": lambda cell: str(cell.model) if cell.workload == "block" else "",
        "updown": lambda cell: "" if cell.updown == "none" else cell.updown,
        "conditioning": lambda cell: cell.conditioning,
        "dropout": lambda cell: f"p={cell.dropout:g}",
        "emb_channels": lambda cell: f"E={cell.emb_channels}",
        "batch": lambda cell: f"b{cell.batch}",
        "microbatch": lambda cell: f"by {cell.microbatch or cell.batch}",
        "dtype": lambda cell: cell.dtype,
        "layout": lambda cell: cell.layout,
        "mode": lambda cell: cell.mode,
    }
    varying = [
        name
        for name in extra
        if any(
            a.model == b.model or name == "model"
            for a, b in itertools.combinations(sites, 2)
            if getattr(a, name) != getattr(b, name)
        )
    ]
    labels = {}
    for site in sites:
        first = f"{site.channels}"
        if site.out_channels != site.channels:
            first += f"→{site.out_channels}"
        if site.workload != "block":
            first = str(site.model)
        rest = ", ".join(text for name in varying if (text := extra[name](site)))
        size = f"{site.resolution}{'¹²³'[site.dims - 1]}"
        labels[site] = visible(f"{first}, {size}\n{rest}".strip())
    return labels


def colour_of(impl: str, impls: Sequence[str]) -> str:
    others = [name for name in impls if name not in COLOURS]
    return COLOURS.get(impl) or OTHER_COLOURS[others.index(impl) % len(OTHER_COLOURS)]


def marker_of(impl: str, impls: Sequence[str]) -> str:
    others = [name for name in impls if name not in MARKERS]
    if impl in MARKERS:
        return MARKERS[impl]
    # Shifted where the colours begin again: sixteen differ in one or the other.
    turns, number = divmod(others.index(impl), len(OTHER_MARKERS))
    return OTHER_MARKERS[(number + turns) % len(OTHER_MARKERS)]


def handle(label: str, colour: str, marker: str) -> Line2D:
    return Line2D(
        [], [], color=colour, marker=marker, linestyle="", markersize=6, label=visible(label)
    )


def plain_log(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a log axis that reaches from `low` to `high`, and enough of them."""
    span = math.log10(high / low)
    ticks = (1, 1.5, 2, 3, 5, 7) if span < 0.9 else (1, 2, 5) if span < 1.8 else (1,)
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def finish(
    figure: Figure,
    run: Run,
    title: str,
    handles: list[Line2D],
    note: str = "",
    *,
    beside: bool = False,
) -> None:
    """Title, caption, and the legend outside the data: in the title's line, or beside it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    where = "outside right center" if beside else "outside upper right"
    columns = 1 if beside else len(handles)
    figure.legend(handles=handles, loc=where, ncols=columns, frameon=False)  # type: ignore[call-overload]
    width = int(_CAPTION_CHARACTERS * figure.get_figwidth())
    lines = map(visible, filter(None, _caption(run, note)))
    caption = "\n".join(textwrap.fill(line, width) for line in lines)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color=GREY)


def _caption(run: Run, note: str) -> list[str]:
    """What all rows share and the labels therefore leave out; where the numbers are from."""
    cells = [row.axes for row in run.rows]
    shared = []
    for name in ("model", "mode", "dtype", "layout", "batch"):
        values = {getattr(cell, name) for cell in cells}
        if len(values) == 1 and (value := values.pop()) is not None:
            shared.append(f"batch {value}" if name == "batch" else str(value))
    return ["; ".join(filter(None, [", ".join(shared), note])), source_of(run)]
