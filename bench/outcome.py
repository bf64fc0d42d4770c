"""What a run shows and leaves when it ends: the table, the derived files, the exit code."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from resblock_bench.bench import exitcodes, table
from resblock_bench.bench.export import export
from resblock_bench.bench.records import Row
from resblock_bench.bench.storage import read_run
from resblock_bench.bench.terminal import say


def show(console: Console, rows: Sequence[Row], planned: int) -> None:
    """The table of the rows, what went wrong, and the summary."""
    if rows:
        width = min(console.width, table.WIDTH)
        console.print(table.results_table(rows), width=width)
    for line in filter(None, [*table.problems(rows), table.disturbed(rows)]):
        say(console, line)
    say(console, table.summary(rows, planned))


def derive(console: Console, folder: Path, formats: Sequence[str], *, plots: bool) -> None:
    """The files that follow from the rows: what cannot be written is no loss."""
    run = read_run(folder)
    try:
        for path in export(run, formats):
            say(console, f"table: {path}")
        if plots:
            # Here and not above: matplotlib takes a second to import, and not every run draws.
            from resblock_bench.bench.plots import draw_all

            for path in draw_all(run):
                if path.suffix == ".png":
                    say(console, f"figure: {path}")
    except OSError as error:
        say(console, f"no more tables or figures: {folder} cannot be written ({error.strerror})")


def exit_code(rows: Sequence[Row], ending: str | None) -> int:
    """`ending` says why cells are left, None where none is."""
    statuses = {row.status for row in rows}
    if "wrong" in statuses:
        return exitcodes.WRONG
    # Out of memory and skipped are results; but a sweep that measured nothing is not a success.
    broken = statuses & {"failed", "timeout", "crashed", "impossible"}
    if ending is not None or broken or "ok" not in statuses:
        return exitcodes.INCOMPLETE
    return exitcodes.OK
