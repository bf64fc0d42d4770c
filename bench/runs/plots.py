"""Draws the figures of a run folder: throughput, peak memory, and the trade between the two.

What a figure does not show is the same in all that it shows: rows that differ in workload, mode,
dtype, layout or dropout are drawn apart. (The dropout of whole models is the models' own.)
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from resblock_bench.bench import files
from resblock_bench.bench.records import Cell

from .dots import draw_dots
from .folder import FIGURES, Run
from .front import draw_front
from .multiples import draw_multiples, is_grid
from .quantities import QUANTITIES
from .style import styled

_APART = ("workload", "mode", "dtype", "layout", "dropout")
_NAMES = {*(quantity.name for quantity in QUANTITIES), "front"}
_SUFFIXES = {".png": {}, ".svg": {"Date": None}}


def draw_all(run: Run) -> list[Path]:
    """Draw every figure that the run has data for into its folder, as PNG and SVG.

    Earlier figures that are not drawn again are removed. Raises UsageError where the folder cannot
    be written.
    """
    folder = run.folder / FIGURES
    paths: list[Path] = []
    with styled(), files.explained(folder, "make it writable"):
        files.make_folder(folder)
        for name, figure in all_figures(run):
            for suffix, metadata in _SUFFIXES.items():
                path = folder / f"{name}{suffix}"
                with files.whole(path) as file:
                    figure.savefig(file, format=suffix[1:], dpi=160, metadata=metadata)
                paths.append(path)
        for path in folder.iterdir():
            ours = path.stem.split("-")[0] in _NAMES and path.suffix in _SUFFIXES
            if ours and path not in paths:
                path.unlink()
    return paths


def all_figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """Every figure that the run has data for, with its file's name; each is closed by the next.

    To be drawn within `styled`.
    """
    for end, part in parts(run).items():
        for name, figure in _figures(part).items():
            yield f"{name}{end}", figure
            plt.close(figure)


def parts(run: Run) -> dict[str, Run]:
    """The rows that may stand in one figure, by how the names of its files end."""
    rows = run.rows
    differing = [name for name in _APART if len({_apart(row.axes, name) for row in rows}) > 1]
    found: dict[str, Run] = {}
    for row in rows:
        end = "".join(_apart(row.axes, name) for name in differing)
        part = found.setdefault(end, dataclasses.replace(run, attempts=[]))
        part.attempts.append(row)
    return found


def _apart(cell: Cell, name: str) -> str:
    """How the name of a cell's figure ends by one of the fields that are drawn apart."""
    if name == "dropout":
        return f"-dropout{cell.dropout}" if cell.workload == "block" else ""
    return f"-{getattr(cell, name)}"


def _figures(run: Run) -> dict[str, Figure]:
    """Those of a part, by name."""
    draw = draw_multiples if is_grid(run) else draw_dots
    figures = {quantity.name: draw(run, quantity) for quantity in QUANTITIES}
    figures["front"] = draw_front(run)
    return {name: figure for name, figure in figures.items() if figure is not None}
