"""The figures of a profile, which load nothing: its memory over the step, and its roofline."""

import io
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from resblock_bench.bench import files
from resblock_bench.bench.records import cell_name
from resblock_bench.bench.runs.style import GREY, plain_log, styled
from resblock_bench.bench.terminal import visible
from resblock_bench.bench.units import MIB, format_mib

from .events import StepStage
from .groups import Group
from .profiles import Category, Profile, ProfilePart
from .trace import ADVICE

_CATEGORIES: dict[Category, str] = {
    "parameters": "#999999",
    "optimizer": "#CCCCCC",
    "inputs": "#E69F00",
    "gradients": "#56B4E9",
    "activations": "#0072B2",
    "temporaries": "#D55E00",
}
_GROUPS: dict[Group, tuple[str, str]] = {
    "convolution": ("#0072B2", "o"),
    "norm-act": ("#D55E00", "D"),
    "attention": ("#CC79A7", "s"),
    "linear": ("#009E73", "^"),
    "elementwise": ("#E69F00", "v"),
    "optimizer": ("#56B4E9", "P"),
    "copies": ("#000000", "X"),
    "compiled": ("#595959", "*"),
}
_STAGES = {"forward": 1.0, "recompute": 0.75, "backward": 0.5, "update": 0.25}
"""How opaque a point is."""
_MOST_HELD = 6
_CHARACTERS = 17  # of a caption, that fit an inch


def draw_memory(found: Profile) -> Figure | None:
    """What is alive over the step by category, with what holds most at the peak; None without."""
    memory = found.memory
    if memory is None:
        return None
    figure, ax = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
    named = [name for name in _CATEGORIES if any(memory.bytes[name])]
    layers = [[count / MIB for count in memory.bytes[name]] for name in named]
    colours = [_CATEGORIES[name] for name in named]
    ax.stackplot(memory.at, layers, labels=named, colors=colours, linewidth=0, step="post")
    top = 1.12 * memory.peak_bytes / MIB
    ax.set(xlim=(0, max(memory.operators, 1)), ylim=(0, top))
    for begin, stage in memory.stages:
        ax.axvline(begin, color=GREY, linewidth=0.8, linestyle=":")
        ax.text(begin, top, f" {stage}", va="top", color=GREY)
    peak_at = memory.at[memory.peak_place]
    ax.plot([peak_at], [memory.peak_bytes / MIB], "v", color="black", markersize=6)
    ax.set_xlabel("operators of the step")
    ax.set_ylabel("MiB alive")
    held = list(memory.held.items())[:_MOST_HELD]
    words = [f"{module or 'the whole itself'} {format_mib(count)}" for module, count in held]
    where = f"{memory.peak_stage} of {memory.peak_module or 'the whole itself'}"
    _finish(
        figure,
        f"Memory of a step: {cell_name(found.cell)}",
        f"peak {format_mib(memory.peak_bytes)} MiB, in the {where}. Most activations and "
        f"temporaries there, MiB: {', '.join(words) or 'none'}",
    )
    return figure


def draw_roofline(found: Profile) -> Figure | None:
    """Operations a second over operations a byte, by group and pass; None where nothing is known of
    the machine or of operators. What computes nothing, such as a copy, is not on it."""
    ceilings = found.ceilings
    flops, moved = (found.total(_kind, "flops"), found.total(_kind, "bytes"))
    points = [
        (kind, flops[kind] / moved[kind], flops[kind] / ns)
        for kind, ns in found.total(_kind).items()
        if kind[0] in _GROUPS and ns and moved[kind] and flops[kind]
    ]
    if ceilings is None or not points:
        return None
    copy = ceilings.copy_bytes_per_s / 1e9
    matrix = ceilings.matrix_flops_per_s[found.cell.dtype] / 1e9
    figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    low = 0.5 * min(matrix / copy, *(x for _, x, _ in points))
    high = 2 * max(matrix / copy, *(x for _, x, _ in points))
    corner = matrix / copy
    ax.plot([low, corner, high], [copy * low, matrix, matrix], color=GREY)
    shown: set[str] = set()
    for (group, stage), x, y in points:
        colour, marker = _GROUPS[group]
        label = None if group in shown else group
        shown.add(group)
        ax.plot([x], [y], marker, color=colour, alpha=_STAGES[stage], label=label, linestyle="")
    bottom = 0.5 * min(copy * low, *(y for _, _, y in points))
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, 2 * matrix))
    plain_log(ax.xaxis, low, high)
    plain_log(ax.yaxis, bottom, 2 * matrix)
    ax.set_xlabel("operations a byte")
    ax.set_ylabel("10⁹ operations a second")
    _finish(
        figure,
        f"Roofline: {cell_name(found.cell)}",
        f"grey: {copy:,.3g} GB/s of a large copy and {matrix:,.4g}·10⁹ operations a second of a "
        "matrix product, both measured before; paler: computed again, backward, update",
    )
    return figure


def _kind(part: ProfilePart) -> tuple[Group, StepStage]:
    return part.group, part.stage


def _finish(figure: Figure, title: str, caption: str) -> None:
    figure.suptitle(visible(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(loc="outside right center", frameon=False)
    text = textwrap.fill(visible(caption), int(_CHARACTERS * figure.get_figwidth()))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=GREY)


def drawn(found: Profile) -> Iterator[tuple[str, Figure]]:
    """The figures that there are, by name; close them."""
    for name, draw in (("memory", draw_memory), ("roofline", draw_roofline)):
        figure = draw(found)
        if figure is not None:
            yield name, figure


def save_figures(found: Profile, folder: Path) -> list[Path]:
    """Write them as SVG. Raises UsageError where they cannot be written."""
    paths = []
    with styled(), plt.rc_context({"svg.fonttype": "none"}):  # text stays text
        for name, figure in drawn(found):
            content = io.BytesIO()
            figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            paths.append(folder / f"{name}.svg")
            files.write(paths[-1], content.getvalue(), ADVICE)
    return paths
