"""From tasks to rows, whatever engine measures them, block by block, as a lazy iterator.

What is decided here needs no measurement: which block comes next, that the time budget is spent,
that a cell is larger than one of its series which ran out of memory.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec

from resblock_bench.bench.measure.cell import Task, row_of
from resblock_bench.bench.measure.workload import unsupported
from resblock_bench.bench.records import OOM_EXPECTED, Cell, Row, cell_name, site_of

from .engines import Block, Engine

_SIZES = ("batch", "resolution", "channels", "out_channels")


class OomRecord:
    """The cells that ran out of memory, and which others therefore will.

    A series are the cells that differ in batch, resolution and channels only, whatever model they
    are from (of whole models, of one model); a cell is larger than another of its series if none of
    these is smaller.
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
    same: dict[str, object] = {size: getattr(other, size) for size in _SIZES}
    if cell.workload == "block":
        same["model"] = other.model
    return msgspec.structs.replace(cell, **same) == other


def blocks_of(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks of each block, in the order in which the blocks come first."""
    blocks: dict[Cell, list[Task]] = {}
    for task in tasks:
        blocks.setdefault(site_of(task.cell), []).append(task)
    return list(blocks.values())


def run_blocks(
    blocks: Iterable[Block],
    engine: Engine,
    *,
    oom: OomRecord | None,
    began: Callable[[Block], None] = lambda block: None,
    budget_s: float | None = None,
    running: dict[Future[list[Row]], Block] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """The rows of `blocks` as these end.

    oom         None tries every cell
    began       told of each block that an engine takes
    budget_s    seconds after which no further block is begun; those under way end
    running     filled with what is under way, for who ends the iteration early
    """
    started = clock()
    queue = iter(blocks)
    running = {} if running is None else running
    while True:
        while len(running) < engine.lanes:
            if budget_s is not None and clock() - started >= budget_s:
                break
            block = next(queue, None)
            if block is None:
                break
            possible = []
            for task in block:
                reason = unsupported(task.cell)
                if reason is None and oom is not None:
                    reason = oom.verdict(task.cell)
                if reason is None:
                    possible.append(task)
                else:
                    yield row_of(task, "skipped", reason)
            if possible:
                began(possible)
                running[engine.submit(possible)] = possible
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        # One at a time: while its rows are handed out, it stays in `running` with the others.
        future = done.pop()
        for row in future.result():
            if oom is not None:
                oom.note(row)
            yield row
        del running[future]
