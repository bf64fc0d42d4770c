"""What the verbs of the command line share: the application, options, and where they print."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from resblock_bench.bench.errors import UsageError

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
    Path | None, typer.Option(metavar="FILE", help="A TOML file in the format of a preset.")
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is a GPU.")
]

ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: the usable CPUs.")
]
GateThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: 1 on a CPU, where it is steadiest.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Of weights, inputs and dropout. Default: 0.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="8m", help="Begin nothing new once this is spent, keeping what was done (code 3)."
    ),
]
TimeoutOption = Annotated[
    str, typer.Option(metavar="5m", help="What a round's check or burst may take.")
]
FormatOption = Annotated[str, typer.Option(metavar="table|md|json|junit", help="Of the report.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the report there; the table is shown all the same."),
]


def refuse(context: typer.Context, options: Iterable[str], why: str) -> None:
    """Raises UsageError for an option that was given and would be ignored."""
    for option in options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{option.replace('_', '-')} {why}")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: what is measured is still written down."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def result_console() -> Console:
    """The standard output, as wide as a table where it is no terminal and COLUMNS is not set."""
    console = _Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        from resblock_bench.bench.runs.table import WIDTH

        console = _Console(width=WIDTH)
    return console


def progress_console() -> Console:
    """For what is under way: what a report is read from stays clean."""
    return _Console(stderr=True)
