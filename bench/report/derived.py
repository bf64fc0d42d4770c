"""What follows from the rows of a run folder: tables in other formats, figures, and the page."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from resblock_bench.bench.errors import InvalidError, UsageError, command
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.runs.export import export
from resblock_bench.bench.runs.folder import read_run
from resblock_bench.bench.terminal import say


class _Wanted(msgspec.Struct):
    folder: str
    formats: list[str]
    plots: bool


class _Derived(msgspec.Struct):
    paths: list[str]
    problem: str | None = None


def derive(console: Console, folder: Path, formats: Sequence[str], *, plots: bool) -> None:
    """Write them, and say where they are, the page last: what cannot be written is no loss.

    In a process of its own, since a figure of many cells takes more memory than all else here.
    """
    if plots or formats:
        wanted = msgspec.json.encode(_Wanted(str(folder), list(formats), plots))
        ending = Processes().run(_write_derived, wanted)
        if ending.reply is None:
            reply = _Derived([], ending.problem()[1])
        else:
            reply = msgspec.json.decode(ending.reply, type=_Derived)
        for path in reply.paths:
            say(console, path)
        if reply.problem is not None:
            say(console, f"no more tables, figures or page: {reply.problem}")
    if not plots:
        say(console, f"its page is written by: {command('report', str(folder))}")


def _write_derived(argument: bytes, channel: Channel) -> bytes:
    from resblock_bench.bench.runs.plots import draw_all

    from .page import write_page

    wanted = msgspec.json.decode(argument, type=_Wanted)
    run = read_run(Path(wanted.folder))
    reply = _Derived([])
    try:
        reply.paths += [f"table: {path}" for path in export(run, wanted.formats)]
        if wanted.plots:
            drawn = draw_all(run)
            reply.paths += [f"figure: {path}" for path in drawn if path.suffix == ".png"]
            reply.paths.append(f"page: {write_page([run], None, predict=False)}")
    except (UsageError, InvalidError) as error:
        reply.problem = str(error)
    return msgspec.json.encode(reply)
