"""From planned cells to rows, one after the other, as a lazy iterator.

What measures a cell is an argument, so that other engines (a process a cell, many GPUs) fit in.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from resblock_bench.bench.grid import PlannedCell
from resblock_bench.bench.records import Row

Measure = Callable[[PlannedCell], Row]


def run_cells(
    planned: Iterable[PlannedCell],
    measure: Measure,
    *,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """The rows of `planned` in order; ends between two cells once `budget_s` seconds are spent."""
    started = clock()
    for item in planned:
        if budget_s is not None and clock() - started >= budget_s:
            return
        yield measure(item)
