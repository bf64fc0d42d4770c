"""What every verb does at a terminal: text that cannot steer it, and an orderly end on SIGTERM."""

import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, which begin a terminal's escape sequences, those of writing direction, and
other line breaks. None of them is given any width."""
_NO_TEXT = re.compile(r"[\ud800-\udfff\ufffe\uffff]")
"""What no file in UTF-8 or XML can hold."""


def visible(text: str) -> str:
    """Text that others wrote, as it is shown on terminals, in Markdown, XML and figures: without
    what would steer them. What is stored keeps it."""
    return _NO_TEXT.sub("\ufffd", _STEERING.sub("", text))


class SafeConsole(Console):
    """A console that shows everything as `visible` does, whatever it is told to print."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None:
                segment = Segment(visible(segment.text), segment.style)
            yield segment

    def on_broken_pipe(self) -> None:
        """Nobody reads any more: what is measured is still written down."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(console: Console, text: str) -> None:
    """A line as it is: paths and reasons are not markup and must not be broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
