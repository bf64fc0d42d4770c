"""Draws the figures of a run folder: throughput, peak memory, and the trade between the two."""

from pathlib import Path

import matplotlib.pyplot as plt

from resblock_bench.bench import files

from .dots import QUANTITIES, draw_dots
from .folder import FIGURES, Run
from .front import draw_front
from .style import styled


def draw_all(run: Run) -> list[Path]:
    """Draw every figure that the run has data for into its folder, as PNG and SVG.

    Raises UsageError where the folder cannot be written.
    """
    folder = run.folder / FIGURES
    paths: list[Path] = []
    with styled(), files.explained(folder, "make it writable"):
        files.make_folder(folder)
        figures = {quantity.name: draw_dots(run, quantity) for quantity in QUANTITIES}
        figures["front"] = draw_front(run)
        for name, figure in figures.items():
            if figure is None:
                continue
            for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
                path = folder / f"{name}{suffix}"
                with files.whole(path) as file:
                    figure.savefig(file, format=suffix[1:], dpi=160, metadata=metadata)
                paths.append(path)
            plt.close(figure)
    return paths
