"""What memory was to be expected of measured cells, by steps on tensors without data."""

import time
from collections.abc import Iterable
from contextlib import suppress

from resblock_bench.bench.measure.scaled_memory import ScaledMemory
from resblock_bench.bench.records import Cell, Memory, Row

PREDICTED = ("reference", "fused")
"""Implementations of this project: to predict those of others, their packages would be imported."""
_MOST_S = 60.0
"""Of computing, for one run; what is left has no prediction."""


_MOST_IMAGES = 4096
"""Of a step; where images are taken one by one, more would take for ever."""


def predicted(rows: Iterable[Row]) -> dict[Cell, Memory]:
    """The predictions by cell, by the code that is here, of cells whose memory was measured."""
    cells = [
        row.axes
        for row in rows
        if row.status == "ok"
        and row.memory is not None
        and row.axes.impl in PREDICTED
        and row.axes.batch <= _MOST_IMAGES
    ]
    found: dict[Cell, Memory] = {}
    predictions, began = ScaledMemory(cells), time.process_time()
    for cell in cells:
        if time.process_time() - began > _MOST_S:
            break
        with suppress(Exception):  # sizes that no tensor has, in somebody else's file
            memory = predictions.memory(cell)
            if memory is not None:
                found[cell] = memory
    return found
