"""What the verbs of the command line share: the application, options, and where they print."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from resblock_bench.bench.errors import UsageError, command
from resblock_bench.bench.terminal import SafeConsole
from resblock_bench.bench.units import counted

_DIGITS = 9  # of a number of threads

app = typer.Typer(
    name="resblock-bench",
    help="Measure and compare diffusion U-Net residual blocks.",
    epilog="Exit codes: 0 fine, 1 regression (plan: does not fit), 2 usage, 3 incomplete or "
    "invalid, 4 inconclusive, 5 wrong results.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def path(text: str) -> Path:
    """A path that a file can have. Empty, it would be the current folder."""
    if not text.strip():
        raise typer.BadParameter("an empty path names no file and no folder: leave the option out")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise typer.BadParameter(f"no file can have this path ({error.strerror})") from None
    return Path(text)


AxisOption = Annotated[
    list[str] | None,
    typer.Option(
        "-a",
        "--axis",
        metavar="NAME=VALUES",
        help="Values of an axis: a comma list, [16:128:x2] or [16:64:+16]. With --preset or "
        "--config it replaces that axis; without, the other axes take their defaults.",
    ),
]
PresetOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="A preset; see 'resblock-bench list'.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(parser=path, metavar="FILE", help="A TOML file in the format of a preset."),
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is a GPU.")
]

ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="CPU threads. Default: OMP_NUM_THREADS, which PyTorch obeys, or the usable CPUs.",
    ),
]
MOST_SEED = 2**63 - 1
"""What PyTorch's generators take, and a row holds."""
SeedOption = Annotated[
    int | None,
    typer.Option(min=0, max=MOST_SEED, help="Of weights, inputs and dropout. Default: 0."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="8m", help="Begin nothing new once this is spent, keeping what was done (code 3)."
    ),
]
TimeoutOption = Annotated[
    str, typer.Option(metavar="5m", help="What a cell's process may take in a round.")
]
FormatOption = Annotated[str, typer.Option(metavar="table|md|json|junit", help="Of the report.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        parser=path, metavar="FILE", help="Write the report there; the table is shown all the same."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        parts = ("resblock-bench", "torch", "triton")
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for name in parts:
                typer.echo(f"{name} {importlib.metadata.version(name)}")
        raise typer.Exit


@app.callback()
def _every_verb(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version, and those of torch and Triton.",
        ),
    ] = False,
) -> None:
    pass


def require_text(words: Iterable[str]) -> None:
    """Raises UsageError for words, or a current folder, that cannot be written down as text."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder is no more: go to another one") from None
    for word in (folder, *words):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{word!r} is not text in UTF-8, which names in files are: rename it"
            ) from None


def proposed(context: typer.Context, *words: str, without: Collection[str] = ()) -> str:
    """The user's own command with some options left out, and words added."""
    found: list[str] = []
    verb: Any = context
    while verb is not None and verb.parent is not None:
        found.insert(0, str(verb.info_name))
        verb = verb.parent
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if name in without or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        flag = option.opts[-1]
        for one in value if isinstance(value, list | tuple) else [value]:
            found += [flag] if one is True else [flag, str(one)]
    return command(*found, *words)


def default_threads() -> int | None:
    """What OMP_NUM_THREADS sets, up to the usable CPUs; None without it, for all of them.

    As PyTorch has it: of a list for nested parallel regions the first, and nothing that is no
    positive number.
    """
    from resblock_bench.bench.machine.proc import usable_cpus

    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not text.isdecimal() or len(text) > _DIGITS or int(text) < 1:
        return None
    return min(int(text), usable_cpus())


def checked_threads(threads: int | None, engine: str = "local") -> int | None:
    """Raises UsageError for more than this machine computes with at once."""
    from resblock_bench.bench.machine.proc import usable_cpus

    if threads is None:
        return default_threads()
    if engine == "local" and threads > usable_cpus():
        raise UsageError(
            f"--threads {threads} is more than the {counted(usable_cpus(), 'CPU')} that this "
            "machine lets it use: name as many or fewer"
        )
    return threads


def refuse(context: typer.Context, options: Iterable[str], why: str) -> None:
    """Raises UsageError for an option, or an argument, that was given and would be ignored."""
    arguments = {p.name for p in context.command.params if p.param_type_name == "argument"}
    for option in options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            shown = option.upper() if option in arguments else f"--{option.replace('_', '-')}"
            raise UsageError(f"{shown} {why}")


def result_console() -> Console:
    """The standard output, as wide as a table where it is no terminal and COLUMNS is not set, or
    has no room for a word."""
    console = SafeConsole()
    if console.width < 20 or (not console.is_terminal and "COLUMNS" not in os.environ):
        from resblock_bench.bench.runs.table import WIDTH

        console = SafeConsole(width=WIDTH)
    return console


def progress_console() -> Console:
    """For what is under way: what a report is read from stays clean."""
    return SafeConsole(stderr=True)
