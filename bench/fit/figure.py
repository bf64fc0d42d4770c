"""The figures of `plan`: the peak over the batch, and the largest batch of published models."""

import textwrap
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resblock_bench.bench import files
from resblock_bench.bench.runs.style import (
    COLOURS,
    GREY,
    MODE_MARKERS,
    MODE_TITLES,
    STYLE,
    handle,
    plain_log,
)

from .equal_memory import EqualMemoryTable
from .peaks import peak_at
from .plans import GIB, MemoryPlan
from .report import NOTE, capacity_name

_LINES: dict[str, Literal["-", "--", ":"]] = {"none": "-", "selective": "--", "full": ":"}


def draw_peaks(found: MemoryPlan) -> Figure:
    """The peak of every variant over the batch, with the devices as lines."""
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
        most = max(found.devices)
        last = max(found.batch, *(plan.largest_batch(most) for plan in found.variants), 2)
        batches = np.unique(np.geomspace(1, last, 200).round().astype(int))
        peaks = []
        for plan in found.variants:
            ys = [peak_at(plan.pieces, int(batch)) / GIB for batch in batches]
            peaks += ys
            ax.plot(
                batches,
                ys,
                color=COLOURS[plan.recipe.impl],
                linestyle=_LINES[plan.recipe.checkpoint],
            )
        for capacity in found.devices:
            ax.axhline(capacity / GIB, color=GREY, linewidth=0.8)
            ax.text(1, capacity / GIB, f" {capacity_name(capacity)}", va="bottom", color=GREY)
        ax.axvline(found.images_a_pass, color=GREY, linewidth=0.8, linestyle=":")
        top = 1.3 * max(most / GIB, found.variants[0].peak.bytes / GIB)
        low = 0.8 * min(*peaks, min(found.devices) / GIB)
        ax.set(xscale="log", yscale="log", xlim=(1, last), ylim=(low, top))
        plain_log(ax.xaxis, 1, last)
        plain_log(ax.yaxis, low, top)
        ax.set_xlabel("images a pass")
        ax.set_ylabel("peak of a training step, GiB")
        _finish(
            figure,
            f"Memory of a training step: {found.subject.name}",
            [
                Line2D(
                    [],
                    [],
                    color=COLOURS[plan.recipe.impl],
                    linestyle=_LINES[plan.recipe.checkpoint],
                    label=f"{plan.recipe.impl}, {MODE_TITLES[plan.recipe.checkpoint]}",
                )
                for plan in found.variants
            ],
            f"{NOTE} torch {found.versions['torch']}, commit {(found.commit or 'unknown')[:12]}",
        )
    return figure


def draw_equal_memory(table: EqualMemoryTable) -> Figure:
    """The largest batches of every model, a panel a device."""
    models = list(dict.fromkeys(row.model for row in table.rows))
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, panels = plt.subplots(
            1, len(table.devices), sharey=True, figsize=(15, 6.4), layout="constrained"
        )
        for number, (ax, capacity) in enumerate(zip(panels, table.devices, strict=True)):
            ax.set_title(capacity_name(capacity))
            sizes = [1]
            for row in table.rows:
                images, recipe = row.largest[number], row.plan.recipe
                if images:
                    sizes.append(images)
                    ax.plot(
                        images,
                        models.index(row.model),
                        marker=MODE_MARKERS[recipe.checkpoint],
                        color=COLOURS[recipe.impl],
                        linestyle="",
                        markersize=5,
                        alpha=0.8,
                    )
            ax.set(xscale="log", xlim=(0.7, 1.5 * max(sizes)))
            plain_log(ax.xaxis, 0.7, 1.5 * max(sizes))
            ax.grid(axis="y", color=GREY, alpha=0.2)
        panels[0].set_yticks(range(len(models)), models)
        panels[0].invert_yaxis()
        panels[0].set_xlabel("largest batch (no marker: not one image)")
        shown = dict.fromkeys((r.plan.recipe.impl, r.plan.recipe.checkpoint) for r in table.rows)
        handles = [
            handle(f"{impl}, {MODE_TITLES[mode]}", COLOURS[impl], MODE_MARKERS[mode])
            for impl, mode in shown
        ]
        commit = (table.commit or "unknown")[:12]
        note = (
            "As published: precision, AdamW, moving average but for classifiers; ADM's attention "
            f"computed again in the backward. {NOTE} torch {table.versions['torch']}, commit "
            f"{commit}"
        )
        _finish(figure, "Largest batch of a training step", handles, note)
    return figure


def _finish(figure: Figure, title: str, handles: list[Line2D], note: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    caption = textwrap.fill(note, int(17 * figure.get_figwidth()))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color=GREY)


def save(figure: Figure, path: Path, advice: str) -> None:
    """As PNG or SVG, by the path's name. Raises UsageError where it cannot be written."""
    with files.explained(path, advice), files.whole(path, named=True) as file:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(file, format=path.suffix[1:], dpi=160, metadata=metadata)
    plt.close(figure)
