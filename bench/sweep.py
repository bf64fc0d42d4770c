"""Carries a sweep out: opens the folder, measures, shows, draws, and says how it ended."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from resblock_bench.bench import environment, exitcodes, table
from resblock_bench.bench.devices import Kind, open_device
from resblock_bench.bench.grid import PlannedCell
from resblock_bench.bench.measure import Session, measure_cell
from resblock_bench.bench.progress import RunProgress
from resblock_bench.bench.records import Row
from resblock_bench.bench.runner import run_cells
from resblock_bench.bench.storage import RunWriter, default_output, read_run
from resblock_bench.bench.timing import Rule


@dataclass(frozen=True)
class Request:
    """A sweep as asked for; `output` None is the default folder, `threads` None the usable CPUs."""

    planned: list[PlannedCell]
    device: Kind
    rule: Rule
    seed: int
    output: Path | None = None
    threads: int | None = None
    budget_s: float | None = None
    plots: bool = True


def carry_out(request: Request, console: Console) -> int:
    """Measure the cells of a request; returns the exit code.

    Ctrl-C and SIGTERM end the sweep with what was measured so far; the code is then INCOMPLETE,
    not the shell's 130, so that a script sees one code for every run that is not whole.
    """
    threads = request.threads or environment.usable_cpus()
    device = open_device(request.device, threads)
    found = environment.gather(threads)
    folder = request.output or default_output(found.machine, Path.cwd())
    session = Session(device, found, request.rule, request.seed)
    # What is imported by now stays: without this each of the collections that a memory measurement
    # needs would walk through all of it.
    gc.freeze()
    rows: list[Row] = []
    ending: str | None = None
    with RunWriter(folder, found) as writer:
        _say(console, f"{len(request.planned)} cells on {device.name} into {folder}")
        try:
            with _terminable(), RunProgress(console, len(request.planned)) as progress:

                def measure(item: PlannedCell) -> Row:
                    progress.begin(item.cell)
                    return measure_cell(item, session)

                for row in run_cells(request.planned, measure, budget_s=request.budget_s):
                    writer.append(row)
                    rows.append(row)
                    progress.finish(row)
        except KeyboardInterrupt:
            ending = "interrupted"
        except OSError as error:
            ending = f"stopped, since {folder} cannot be written ({error.strerror})"
        saved = writer.count
    left = len(request.planned) - saved
    if ending is None and left:
        ending = "stopped, since the time budget is spent"
    _show(console, rows, len(request.planned))
    if request.plots and rows:
        _draw(console, folder)
    if ending is not None:
        _say(console, f"{ending}: {saved} rows are in {folder}, {left} cells are left")
    return _exit_code(rows, ending)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(console: Console, rows: list[Row], planned: int) -> None:
    if rows:
        width = min(console.width, table.WIDTH)
        console.print(table.results_table(rows), width=width)
    for line in table.problems(rows):
        _say(console, line)
    _say(console, table.summary(rows, planned))


def _say(console: Console, text: str) -> None:
    """A line as it is: paths and reasons are not markup and must not be broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _draw(console: Console, folder: Path) -> None:
    # Here and not above: matplotlib takes a second to import, and not every run draws.
    from resblock_bench.bench.plots import draw_all

    for path in draw_all(read_run(folder)):
        if path.suffix == ".png":
            _say(console, f"figure: {path}")


def _exit_code(rows: list[Row], ending: str | None) -> int:
    statuses = {row.status for row in rows}
    if "wrong" in statuses:
        return exitcodes.WRONG
    # Out of memory and skipped are results; but a sweep that measured nothing is not a success.
    if ending is not None or "failed" in statuses or "ok" not in statuses:
        return exitcodes.INCOMPLETE
    return exitcodes.OK
