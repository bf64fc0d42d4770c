"""What is shown of long work: a live bar on a terminal, lines elsewhere."""

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

from .terminal import say
from .units import format_duration

_LINES = 10
"""How many `counted` prints where there is no terminal."""


class TaskProgress:
    """`total` tasks, one after the other or several at a time: told of each before and after.

    `name` stands beside the bar until the first begins.
    """

    def __init__(self, console: Console, total: int, name: str = "") -> None:
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
        self._task = self._bar.add_task(name, total=total)

    def begin(self, name: str) -> None:
        """The task that is next."""
        self._bar.update(self._task, description=name)

    def finish(self, line: str | None) -> None:
        """What a task has come to: a line where there is no bar."""
        self._done += 1
        self._bar.advance(self._task)
        if line is not None and not self._console.is_terminal:
            left_s = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            say(
                self._console,
                f"[{self._done}/{self._total}] {line} ({format_duration(left_s)} left)",
            )

    def __enter__(self) -> "TaskProgress":
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
def counted(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Many tasks of which nobody asks for each: without a terminal a line every tenth of them.

    Call what it yields after each.
    """
    done = 0
    if not console.is_terminal:
        say(console, f"{what}: {total} tasks")
    with TaskProgress(console, total, what) as progress:

        def advance() -> None:
            nonlocal done
            done += 1
            passed = done * _LINES // total > (done - 1) * _LINES // total
            progress.finish(what if passed else None)

        yield advance
