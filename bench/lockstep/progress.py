"""What is shown of rounds: their number is not known beforehand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TextColumn

from resblock_bench.bench.records import Cell, cell_name
from resblock_bench.bench.terminal import say

from .rounds import Draw


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
                say(console, f"{stage}: round {rounds} of {cells} cells{lost}")

        yield tell
