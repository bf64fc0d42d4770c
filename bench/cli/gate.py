"""The verbs of the gate: compare, calibrate, check and baseline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resblock_bench.bench.errors import InvalidError, NothingSelectedError, UsageError

from .app import (
    AxisOption,
    ConfigOption,
    DeviceOption,
    FormatOption,
    OutputOption,
    PresetOption,
    SeedOption,
    ThreadsOption,
    TimeoutOption,
    app,
    checked_threads,
    path,
    progress_console,
    refuse,
    result_console,
)

if TYPE_CHECKING:
    from resblock_bench.bench.compare.compare import BaseRequest
    from resblock_bench.bench.grid.plan import Plan

SourceOption = Annotated[
    list[Path] | None,
    typer.Option(
        parser=path,
        metavar="DIR",
        help="With --base in another repository: the folder its packages are imported from.",
    ),
]
StaticOption = Annotated[
    bool, typer.Option("--static", help="Bytes and machine code for GPUs that are not there.")
]
MemoryOption = Annotated[
    bool,
    typer.Option("--memory", help="Bytes of published blocks' training steps, on fake tensors."),
]
AccuracyOption = Annotated[
    bool, typer.Option("--accuracy", help="Errors of the kernels against float64, interpreted.")
]
TimingOption = Annotated[
    bool, typer.Option("--timing", help="Time of the gate's cells, in rounds of processes.")
]
PinsOption = Annotated[
    Path | None,
    typer.Option(
        parser=path, metavar="DIR", help="Default: results/pins of the repository around here."
    ),
]

_OF_TIMING = ("axis", "preset", "config", "device", "source", "timeout", "threads", "seed")
"""Options that say what is timed against a base, and how."""


@app.command()
def compare(
    context: typer.Context,
    measured: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=path,
            metavar="[A B | RUN]",
            help="Two run folders; or one, of which fused is compared to reference.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REV", help="Measure this git revision against the working tree, in turns."
        ),
    ] = None,
    axis: AxisOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    source: SourceOption = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative", help="Compare the ratios of fused to reference: also across machines."
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of every cell which rules decided.")
    ] = False,
    timeout: TimeoutOption = "5m",
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> None:
    """Give a verdict on every cell: SAME, FAST, SLOW or AMBIGUOUS.

    With --base, five to thirteen rounds of both revisions in lockstep, by default over the preset
    gate-cpu or gate-cuda; what is slow or fast is drawn a second time. Exit codes: 0 nothing is
    slower, 1 slower, 3 something is missing or failed, 4 no verdict is possible, 5 wrong results.
    """
    from resblock_bench.bench.compare import compare as comparing
    from resblock_bench.bench.findings.report import destination, write

    to = destination(format, output)
    console, here, paths = result_console(), Path.cwd(), measured or []
    if base is None:
        refuse(context, _OF_TIMING, "goes with --base: what is stored is compared as it is")
    elif paths or relative:
        raise UsageError(
            "--base measures two revisions: leave out the run folders and --relative, or --base"
        )
    if base is not None:
        plan = _gate_plan(axis, preset, config, device, threads, seed)
        named = _options_of_cells(axis, preset, config)
        request = _base_request(base, plan, source, timeout, named)
        outcome = comparing.against_base(request, progress_console())
    elif len(paths) == 2:
        outcome = comparing.of_stored(paths[0], paths[1], here, relative=relative)
    elif len(paths) == 1 and not relative:
        outcome = comparing.of_variants(paths[0], here)
    else:
        raise UsageError(
            f"{len(paths)} runs were named{' with --relative' if relative else ''}: name two run "
            "folders, one to compare its fused cells with the reference, or a revision with --base"
        )
    raise typer.Exit(write(comparing.report_of(outcome, explain=explain), to, console))


def _gate_plan(
    axis: list[str] | None,
    preset: str | None,
    config: Path | None,
    device: str | None,
    threads: int | None,
    seed: int | None,
) -> Plan:
    """The cells that a gate times: those of gate-cpu or gate-cuda unless others are named."""
    from resblock_bench.bench.grid.grid import plan
    from resblock_bench.bench.grid.plan import Plan
    from resblock_bench.bench.grid.presets import choose
    from resblock_bench.bench.measure.devices import default_kind, device_kind

    kind = default_kind() if device is None else device_kind(device)
    if not (axis or preset or config):
        preset = f"gate-{kind}"
    sweep = choose(axis or [], preset, config, kind)
    try:
        cells = plan(sweep.grids)
    except NothingSelectedError as error:  # a gate that compares nothing has not passed
        raise InvalidError(str(error)) from None
    measured = (None if device is None else kind) or sweep.device or kind
    return Plan(
        device=measured,
        rule=sweep.settings.rule(),
        seed=seed or 0,
        threads=checked_threads(threads),
        memory_limit_bytes=None,
        cells=cells,
    )


def _options_of_cells(axis: list[str] | None, preset: str | None, config: Path | None) -> list[str]:
    """The words that name the same cells once more."""
    words = [word for one in axis or [] for word in ("-a", one)]
    if preset is not None:
        words += ["--preset", preset]
    return words if config is None else [*words, "--config", str(config)]


def _base_request(
    base: str, plan: Plan, source: list[Path] | None, timeout: str, cells: list[str]
) -> BaseRequest:
    from resblock_bench.bench.compare.compare import BaseRequest
    from resblock_bench.bench.compare.source_tree import repository_around, require_sources, resolve
    from resblock_bench.bench.units import parse_duration_s

    # What is wrong with these is found before anything is measured.
    repository = repository_around(Path.cwd())
    resolve(repository, base)
    require_sources(str(repository), repository, source or ())
    return BaseRequest(
        base=base,
        plan=plan,
        start=Path.cwd(),
        timeout_s=parse_duration_s(timeout),
        sources=tuple(source or ()),
        cells=tuple(cells),
    )


@app.command()
def calibrate(
    axis: AxisOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    rounds: Annotated[
        int,
        typer.Option(min=5, max=1000, metavar="15", help="Rounds of every cell against itself."),
    ] = 15,
    timeout: TimeoutOption = "5m",
    threads: ThreadsOption = None,
    seed: SeedOption = None,
) -> None:
    """Measure how far two runs of the same code lie apart here, and store the tolerance.

    The cells of gate-cpu or gate-cuda unless others are named. Verdicts take the tolerance from
    results/baselines/MACHINE/calibration-DEVICE-THREADS.json and say so when it is missing or
    stale.
    """
    from resblock_bench.bench.compare import calibrate as calibrating
    from resblock_bench.bench.units import parse_duration_s

    plan = _gate_plan(axis, preset, config, device, threads, seed)
    request = calibrating.CalibrationRequest(plan, Path.cwd(), rounds, parse_duration_s(timeout))
    raise typer.Exit(calibrating.carry_out(request, result_console()))


@app.command()
def check(
    context: typer.Context,
    static: StaticOption = False,
    memory: MemoryOption = False,
    accuracy: AccuracyOption = False,
    timing: TimingOption = False,
    pins: PinsOption = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Time the working tree against this git revision."),
    ] = None,
    axis: AxisOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    source: SourceOption = None,
    timeout: TimeoutOption = "5m",
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> None:
    """The gate: what the kernels cost against what is pinned, in all parts that can be done here.

    Exit codes: 0 as expected, 1 worse, 3 missing, damaged or crashed, 4 better or changed (save
    it, or take it back) or no verdict, 5 wrong. Axes, preset, config, device, source,
    threads and seed are those of the timing.
    """
    from resblock_bench.bench.findings.report import destination, write
    from resblock_bench.bench.gate import check as checking
    from resblock_bench.bench.gate import timing as check_timing

    names = _named(static=static, memory=memory, accuracy=accuracy, timing=timing)
    if names and not timing:
        options = ("base", *_OF_TIMING)
        refuse(context, options, "goes with --timing: name it too, or no part at all")
    if base is None:
        refuse(context, _OF_TIMING, "goes with --base: without a revision nothing is timed")
    if pins is not None and not pins.is_dir():
        raise UsageError(f"--pins {pins} is no folder: name the one that holds static/ and memory/")
    to, console = destination(format, output), result_console()
    # A report on the standard output stands alone there.
    alone = format != "table" and output is None
    progress = progress_console() if alone else console
    parts = checking.against_pins(pins, progress)
    parts[checking.TIMING] = checking.NO_BASE
    if base is not None:
        plan = _gate_plan(axis, preset, config, device, threads, seed)
        named = _options_of_cells(axis, preset, config)
        request = _base_request(base, plan, source, timeout, named)
        parts[checking.TIMING] = functools.partial(check_timing.check, request, progress)
    raise typer.Exit(write(checking.report_of(checking.check(names, parts), pins), to, console))


def _named(**parts: bool) -> list[str]:
    """The parts whose option was given."""
    return [name for name, given in parts.items() if given]


baseline = typer.Typer(
    help="Save what is expected, show it, and compare with it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(baseline, name="baseline")


@baseline.command()
def save(
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Why, for those who review it; required.")
    ] = "",
    static: StaticOption = False,
    memory: MemoryOption = False,
    accuracy: AccuracyOption = False,
    pins: PinsOption = None,
) -> None:
    """Measure the parts named and save what they find; what is wrong or invalid is not saved."""
    from resblock_bench.bench.gate import baseline as baseline_pins

    names = _named(static=static, memory=memory, accuracy=accuracy)
    raise typer.Exit(baseline_pins.save(names, reason, pins, result_console()))


@baseline.command()
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="[PART|SUBJECT]", help="Default: all pins.")
    ] = None,
    pins: PinsOption = None,
) -> None:
    """When and why each was saved; of a subject, its figures."""
    from resblock_bench.bench.gate import baseline as baseline_pins

    raise typer.Exit(baseline_pins.show_pins(name, pins, result_console()))


@baseline.command()
def diff(
    static: StaticOption = False,
    memory: MemoryOption = False,
    accuracy: AccuracyOption = False,
    pins: PinsOption = None,
) -> None:
    """Measure, and show what saving would change; the exit code does not judge it."""
    from resblock_bench.bench.gate import baseline as baseline_pins

    names = _named(static=static, memory=memory, accuracy=accuracy)
    raise typer.Exit(baseline_pins.diff(names, pins, result_console()))
