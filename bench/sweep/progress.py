"""What is shown while cells are measured: a live bar on a terminal, one line a cell elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from resblock_bench.bench.lockstep.draws import Draw
from resblock_bench.bench.records import Cell, Row, cell_name
from resblock_bench.bench.units import format_duration

_LINES = 10
"""How many a work of many tasks prints where there is no terminal."""


@contextmanager
def task_progress(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over `total` tasks on a terminal, a line every tenth of them elsewhere.

    Call what it yields after each.
    """
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        bar.advance(task)
        if done * _LINES // total > (done - 1) * _LINES // total:
            line(f"{what}: {done} of {total}")

    def line(text: str) -> None:
        if not console.is_terminal:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{what}: {total} tasks")
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    description = TextColumn("{task.description}", markup=False)
    with Progress(
        *columns, description, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield advance


class RunProgress:
    """Told of each cell before and after; prints to the console it is given."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def begin(self, cell: Cell) -> None:
        """The cell that is measured next."""
        self._bar.update(self._task, description=cell_name(cell))

    def finish(self, row: Row) -> None:
        """The row of the cell that was just measured."""
        self._done += 1
        self._bar.advance(self._task)
        if not self._console.is_terminal:
            elapsed_s = time.monotonic() - self._started
            left_s = elapsed_s / self._done * (self._total - self._done)
            result: str = row.status
            if row.throughput_images_per_s is not None:
                result = f"{row.throughput_images_per_s:,.1f} images/s"
            self._console.print(
                f"[{self._done}/{self._total}] {cell_name(row.axes)}: {result} "
                f"({format_duration(left_s)} left)",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def __enter__(self) -> "RunProgress":
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)


@contextmanager
def round_progress(console: Console, cells: int) -> Iterator[Callable[[str, Draw], None]]:
    """Call what it yields before each round, with what the round is for.

    How many there will be is not known beforehand, so a terminal shows the number of this one;
    elsewhere there is a line for every round of all cells.
    """
    text = TextColumn("{task.description}", markup=False)
    rounds = 0
    disturbed: dict[tuple[str, Cell], int] = {}
    with Progress(text, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("starting")

        def tell(stage: str, draw: Draw) -> None:
            nonlocal rounds
            rounds += 1
            cell = draw.task.cell
            disturbed[stage, cell] = len(draw.disturbed)
            count = sum(disturbed.values())
            lost = f" ({count} disturbed)" if count else ""
            bar.update(shown, description=f"{stage}, round {rounds}{lost}: {cell_name(cell)}")
            if not console.is_terminal and rounds % cells == 1 % cells:
                line = f"{stage}: round {rounds} of {cells} cells{lost}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield tell
