"""From tasks to rows, whatever engine measures them, as a lazy iterator.

What is decided here needs no measurement: which cell comes next, that the time budget is spent,
that a cell is larger than one of its series which ran out of memory.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec

from resblock_bench.bench.measure.cell import Task, row_of
from resblock_bench.bench.measure.workload import unsupported
from resblock_bench.bench.records import OOM_EXPECTED, Cell, Row, cell_name

from .engines import Engine

_SIZES = ("batch", "resolution", "channels", "out_channels")


class OomRecord:
    """The cells that ran out of memory, and which others therefore will.

    A series are the cells that differ in batch, resolution and channels only, whatever model they
    are from; a cell is larger than another of its series if none of these is smaller.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._cells: list[Cell] = []
        for row in rows:
            self.note(row)

    def note(self, row: Row) -> None:
        if row.status == "oom":
            self._cells.append(row.axes)

    def verdict(self, cell: Cell) -> str | None:
        """Why the cell need not be tried, or None."""
        for other in self._cells:
            if _is_larger(cell, other):
                return f"{OOM_EXPECTED}: {cell_name(other)}, which is no larger, ran out of memory"
        return None


def _is_larger(cell: Cell, other: Cell) -> bool:
    if any(getattr(cell, size) < getattr(other, size) for size in _SIZES):
        return False
    same = {size: getattr(other, size) for size in _SIZES}
    return msgspec.structs.replace(cell, **same, model=other.model) == other


def run_tasks(
    tasks: Iterable[Task],
    engine: Engine,
    *,
    oom: OomRecord | None,
    began: Callable[[Cell], None] = lambda cell: None,
    budget_s: float | None = None,
    running: dict[Future[Row], Task] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """The rows of `tasks` as they end.

    oom         None tries every cell
    began       told of each cell that an engine takes
    budget_s    seconds after which no further cell is begun; those under way end
    running     filled with what is under way, for who ends the iteration early
    """
    started = clock()
    queue = iter(tasks)
    running = {} if running is None else running
    while True:
        while len(running) < engine.lanes:
            if budget_s is not None and clock() - started >= budget_s:
                break
            task = next(queue, None)
            if task is None:
                break
            reason = unsupported(task.cell)
            if reason is None and oom is not None:
                reason = oom.verdict(task.cell)
            if reason is not None:
                yield row_of(task, "skipped", reason)
                continue
            began(task.cell)
            running[engine.submit(task)] = task
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        # One at a time: the others stay in `running` while this row is handed out.
        future = done.pop()
        row = future.result()
        del running[future]
        if oom is not None:
            oom.note(row)
        yield row
