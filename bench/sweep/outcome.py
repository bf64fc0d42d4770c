"""What a run shows and leaves when it ends: the table, the derived files, the exit code."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.process import Announce, Processes
from resblock_bench.bench.records import Row
from resblock_bench.bench.runs import table
from resblock_bench.bench.runs.export import export
from resblock_bench.bench.runs.folder import read_run
from resblock_bench.bench.terminal import say


def show(console: Console, rows: Sequence[Row], planned: int) -> None:
    """The table of the rows, what went wrong, and the summary."""
    if rows:
        width = min(console.width, table.WIDTH)
        console.print(table.results_table(rows), width=width)
    for line in filter(None, [*table.problems(rows), table.disturbed(rows)]):
        say(console, line)
    say(console, table.summary(rows, planned))


class _Wanted(msgspec.Struct):
    folder: str
    formats: list[str]
    plots: bool


class _Derived(msgspec.Struct):
    paths: list[str]
    problem: str | None = None


def derive(console: Console, folder: Path, formats: Sequence[str], *, plots: bool) -> None:
    """The files that follow from the rows: what cannot be written is no loss.

    In a process of its own, since a figure of many cells takes more memory than all else here.
    """
    if not plots and not formats:
        return
    wanted = msgspec.json.encode(_Wanted(str(folder), list(formats), plots))
    ending = Processes().run(_write_derived, wanted)
    if ending.reply is None:
        say(console, f"no more tables or figures: {ending.problem()[1]}")
        return
    reply = msgspec.json.decode(ending.reply, type=_Derived)
    for path in reply.paths:
        say(console, path)
    if reply.problem is not None:
        say(console, f"no more tables or figures: {reply.problem}")


def _write_derived(argument: bytes, announce: Announce) -> bytes:
    from resblock_bench.bench.runs.plots import draw_all

    wanted = msgspec.json.decode(argument, type=_Wanted)
    run = read_run(Path(wanted.folder))
    reply = _Derived([])
    try:
        reply.paths += [f"table: {path}" for path in export(run, wanted.formats)]
        if wanted.plots:
            drawn = draw_all(run)
            reply.paths += [f"figure: {path}" for path in drawn if path.suffix == ".png"]
    except UsageError as error:
        reply.problem = str(error)
    return msgspec.json.encode(reply)


def exit_code(rows: Sequence[Row], planned: int, ending: str | None) -> int:
    """Of the rows of a run with `planned` cells; `ending` says why it ended early, or is None."""
    statuses = {row.status for row in rows}
    if "wrong" in statuses:
        return exitcodes.WRONG
    # Out of memory and skipped are results; but a sweep that measured nothing is not a success.
    broken = statuses & {"failed", "timeout", "crashed", "impossible"}
    if ending is not None or len(rows) < planned or broken or "ok" not in statuses:
        return exitcodes.INCOMPLETE
    return exitcodes.OK
