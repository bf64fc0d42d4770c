"""The command line: `resblock-bench VERB`, also `python -m resblock_bench.bench VERB`.

Verbs import what they need themselves, so that --help does not wait for PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import InvalidError, UsageError

if TYPE_CHECKING:
    from resblock_bench.bench.compare import BaseRequest
    from resblock_bench.bench.plan import Plan

app = typer.Typer(
    name="resblock-bench",
    help="Measure, compare and profile diffusion U-Net residual blocks.",
    epilog="Exit codes: 0 fine, 1 regression, 2 usage, 3 incomplete or invalid, 4 inconclusive, "
    "5 wrong results.",
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
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Of weights, inputs and dropout. Default: 0.")
]
FormatOption = Annotated[str, typer.Option(metavar="table|md|json|junit", help="Of the report.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the report there; the table is shown all the same."),
]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: what is measured is still written down."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console() -> Console:
    console = _Console()
    if not console.is_terminal:
        from resblock_bench.bench.table import WIDTH

        console = _Console(width=WIDTH)
    return console


def _progress_console() -> Console:
    """For what is under way: what a report is read from stays clean."""
    return Console(stderr=True)


@app.command()
def run(
    axis: AxisOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Default: results/runs/MACHINE/RUN under the checkout."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="8m", help="Stop between two cells once this is spent (code 3)."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Measure what the run in --output lacks, and nothing else."),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="With --resume: again what has no measurement."),
    ] = False,
    ignore_oom_record: Annotated[
        bool,
        typer.Option(
            "--ignore-oom-record",
            help="Try cells larger than one that ran out of memory; on resuming, that one, too.",
        ),
    ] = False,
    timeout: Annotated[
        str, typer.Option(metavar="5m", help="What a cell may take before it is ended.")
    ] = "5m",
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="4GiB", help="What a CPU cell may allocate. Default: what is free."),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="0,1", help="GPUs, by position or UUID, a lane each. Default: all visible."
        ),
    ] = None,
    telemetry: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Play back a recorded trace in place of the machine's counters."
        ),
    ] = None,
    max_time: Annotated[
        str | None, typer.Option(metavar="1s", help="Limit on sampling one cell.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Take exactly this many samples of each cell.")
    ] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="csv,parquet,md", help="Write the rows in these formats, too."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="This machine, or the nodes of a Ray cluster.")
    ] = "local",
    accelerator: Annotated[
        str | None,
        typer.Option(metavar="H100", help="With --engine ray: the type of GPU, as Ray names it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and predicted bytes; run nothing.")
    ] = False,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no figures.")] = False,
) -> None:
    """Measure a grid of residual blocks; with no argument, the default preset of this machine.

    Writes a run folder (cells.jsonl, environment.json, figures), prints a table. Ctrl-C keeps
    what was measured and exits with 3.
    """
    import dataclasses

    from resblock_bench.bench.devices import default_kind, device_kind
    from resblock_bench.bench.export import parse_formats
    from resblock_bench.bench.grid import plan
    from resblock_bench.bench.listing import planned_cells
    from resblock_bench.bench.plan import Plan
    from resblock_bench.bench.presets import choose
    from resblock_bench.bench.storage import read_plan
    from resblock_bench.bench.sweep import Request, carry_out, folder_to_resume
    from resblock_bench.bench.telemetry import Replay
    from resblock_bench.bench.units import parse_bytes, parse_duration_s

    if retry_failed and not resume:
        raise UsageError("--retry-failed goes with --resume: it looks at the rows of that run")
    if telemetry is not None:
        Replay(telemetry)  # a bad trace is found before anything is measured
    budget_s = None if time_budget is None else parse_duration_s(time_budget)
    asked: Plan | None = None
    # An earlier run knows its own cells, unless some are named.
    if not resume or axis or preset or config:
        kind = None if device is None else device_kind(device)
        sweep = choose(axis or [], preset, config, kind or default_kind())
        rule = sweep.settings.rule()
        if max_time is not None:
            rule = dataclasses.replace(rule, max_time_s=parse_duration_s(max_time))
        if samples is not None:
            rule = dataclasses.replace(rule, min_samples=samples, max_samples=samples)
        asked = Plan(
            device=kind or sweep.device or default_kind(),
            rule=rule,
            seed=seed or 0,
            threads=threads,
            memory_limit_bytes=None if memory_limit is None else parse_bytes(memory_limit),
            cells=plan(sweep.grids, by_value=budget_s is not None),
        )
    else:
        settings = {
            "--device": device,
            "--seed": seed,
            "--samples": samples,
            "--max-time": max_time,
            "--threads": threads,
            "--memory-limit": memory_limit,
        }
        for flag, given in settings.items():
            if given is not None:
                raise UsageError(f"{flag} is set by the run that is resumed: leave it out")
    console = _console()
    if dry_run:
        shown = asked or read_plan(folder_to_resume(output))
        console.print(planned_cells(shown.cells))
        return
    request = Request(
        plan=asked,
        output=output,
        resume=resume,
        retry=retry_failed,
        ignore_oom=ignore_oom_record,
        timeout_s=parse_duration_s(timeout),
        budget_s=budget_s,
        telemetry=telemetry,
        devices=devices.split(",") if devices else (),
        plots=not no_plots,
        formats=parse_formats(formats) if formats else (),
        engine=engine,
        accelerator=accelerator,
    )
    raise typer.Exit(carry_out(request, console))


@app.command("list")
def list_(
    axis: AxisOption = None, preset: PresetOption = None, config: ConfigOption = None
) -> None:
    """Show presets, axes, implementations and models; with a selection, its cells and bytes."""
    from resblock_bench.bench.devices import default_kind
    from resblock_bench.bench.grid import plan
    from resblock_bench.bench.listing import choices, planned_cells
    from resblock_bench.bench.presets import choose

    console = _console()
    if axis or preset or config:
        sweep = choose(axis or [], preset, config, default_kind())
        console.print(planned_cells(plan(sweep.grids)))
    else:
        console.print(choices())


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
) -> None:
    """Draw the figures of run folders again, into their figures/."""
    from resblock_bench.bench.plots import draw_all
    from resblock_bench.bench.storage import read_run

    for run_ in [read_run(folder) for folder in runs]:
        for note in run_.notes:
            typer.echo(note, err=True)
        paths = draw_all(run_)
        if not paths:
            raise UsageError(f"{run_.folder} holds no measured cell: there is nothing to draw")
        for path in paths:
            typer.echo(path)


@app.command()
def cost(
    axis: AxisOption = None,
    arch: Annotated[
        str,
        typer.Option(metavar="80,90,100", help="NVIDIA architectures, as compute capability·10."),
    ] = "80,90,100",
    tier: Annotated[
        str | None,
        typer.Option(metavar="A|B|C|D", help="Cost this tier, not the one that would be chosen."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number here, too.")
    ] = None,
) -> None:
    """Show what the kernels cost, with no GPU: bytes, sectors, registers, spills, instructions.

    Both norms of the selected blocks, at a batch of 8 by default; without axes, one site a tier.
    """
    from resblock_bench.bench import cost as costs
    from resblock_bench.bench.axes import parse_arguments

    archs = arch.replace("sm_", "").split(",")
    for name in archs:
        if not name.strip().isdigit():
            raise UsageError(f"--arch {arch!r} is no list of architectures: write 80,90,100")
    request = costs.Request(
        selection={**costs.DEFAULT, **parse_arguments(axis or [])},
        archs=list(dict.fromkeys(map(int, archs))),
        tier=None if tier is None else costs.tier_named(tier),
        json=json,
    )
    raise typer.Exit(costs.carry_out(request, _console()))


@app.command()
def tune(
    axis: AxisOption = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: the table that the kernels read."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="3m", help="Stop once this is spent, keeping the table (code 3)."),
    ] = None,
    no_cooperative: Annotated[
        bool,
        typer.Option("--no-cooperative", help="Leave out launches whose programs wait for others."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs.")] = 0,
) -> None:
    """Measure launch choices on this GPU, and write the table that the kernels read.

    The norms of the selected blocks, heaviest first; by default those of the published models in
    bf16. Wrong choices are refused; the table is written after every bucket.
    """
    from resblock_bench.bench import tune as tuning
    from resblock_bench.bench.tune_choices import select
    from resblock_bench.bench.units import parse_duration_s

    request = tuning.Request(
        planned=select(axis or []),
        output=output,
        budget_s=None if time_budget is None else parse_duration_s(time_budget),
        cooperative=not no_cooperative,
        seed=seed,
    )
    raise typer.Exit(tuning.tune(request, _console()))


@app.command()
def compare(
    measured: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[A B | RUN]",
            help="Two run folders or baselines; or one, of which fused is compared to reference.",
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
    source: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="With --base in another repository: the folder its packages are imported from.",
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative", help="Compare the ratios of fused to reference: also across machines."
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of every cell which rules decided.")
    ] = False,
    timeout: Annotated[
        str, typer.Option(metavar="5m", help="What a round's check or burst may take.")
    ] = "5m",
    telemetry: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Play back a recorded trace in place of the machine's counters."
        ),
    ] = None,
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
    from resblock_bench.bench import compare as comparing
    from resblock_bench.bench.report import destination

    to = destination(format, output)
    console, here, paths = _console(), Path.cwd(), measured or []
    if base is None:
        _refuse_with_stored(
            {
                "--axis": axis,
                "--preset": preset,
                "--config": config,
                "--device": device,
                "--source": source,
                "--telemetry": telemetry,
                "--threads": threads,
                "--seed": seed,
            }
        )
    elif paths or relative:
        raise UsageError(
            "--base measures two revisions: leave out the run folders and --relative, or --base"
        )
    if base is not None:
        plan = _gate_plan(axis, preset, config, device, threads, seed)
        request = _base_request(base, plan, source, timeout, telemetry)
        outcome = comparing.against_base(request, _progress_console())
    elif len(paths) == 2:
        outcome = comparing.of_stored(paths[0], paths[1], here, relative=relative)
    elif len(paths) == 1 and not relative:
        outcome = comparing.of_variants(paths[0], here)
    else:
        raise UsageError(
            f"{len(paths)} runs were named{' with --relative' if relative else ''}: name two run "
            "folders or baselines, one to compare its fused cells with the reference, or a "
            "revision with --base"
        )
    raise typer.Exit(comparing.carry_out(outcome, to, console, explain=explain))


def _refuse_with_stored(options: dict[str, object]) -> None:
    for flag, given in options.items():
        if given is not None:
            raise UsageError(f"{flag} goes with --base: what is stored is compared as it is")


def _gate_plan(
    axis: list[str] | None,
    preset: str | None,
    config: Path | None,
    device: str | None,
    threads: int | None,
    seed: int | None,
) -> Plan:
    """The cells that a gate times: those of gate-cpu or gate-cuda unless others are named."""
    from resblock_bench.bench.devices import default_kind, device_kind
    from resblock_bench.bench.grid import plan
    from resblock_bench.bench.plan import Plan
    from resblock_bench.bench.presets import choose

    kind = default_kind() if device is None else device_kind(device)
    if not (axis or preset or config):
        preset = f"gate-{kind}"
    sweep = choose(axis or [], preset, config, kind)
    return Plan(
        device=(None if device is None else kind) or sweep.device or kind,
        rule=sweep.settings.rule(),
        seed=seed or 0,
        threads=threads,
        memory_limit_bytes=None,
        cells=plan(sweep.grids),
    )


def _base_request(
    base: str, plan: Plan, source: list[Path] | None, timeout: str, telemetry: Path | None
) -> BaseRequest:
    from resblock_bench.bench.compare import BaseRequest
    from resblock_bench.bench.telemetry import Replay
    from resblock_bench.bench.units import parse_duration_s

    if telemetry is not None:
        Replay(telemetry)  # a bad trace is found before anything is measured
    return BaseRequest(
        base=base,
        plan=plan,
        start=Path.cwd(),
        timeout_s=parse_duration_s(timeout),
        sources=tuple(source or ()),
        telemetry=telemetry,
    )


@app.command()
def calibrate(
    axis: AxisOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    rounds: Annotated[
        int, typer.Option(min=5, metavar="15", help="Rounds of every cell against itself.")
    ] = 15,
    threads: ThreadsOption = None,
    seed: SeedOption = None,
) -> None:
    """Measure how far two runs of the same code lie apart here, and store the tolerance.

    The cells of gate-cpu or gate-cuda unless others are named. Verdicts take the tolerance from
    results/baselines/MACHINE/calibration.json and say so when it is missing or stale.
    """
    from resblock_bench.bench import calibrate as calibrating

    plan = _gate_plan(axis, preset, config, device, threads, seed)
    request = calibrating.Request(plan, Path.cwd(), rounds)
    raise typer.Exit(calibrating.carry_out(request, _console()))


@app.command()
def env(
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Record the machine's counters, too: a trace for run --telemetry."
        ),
    ] = None,
    duration: Annotated[str, typer.Option(metavar="10s", help="How long to record.")] = "10s",
) -> None:
    """Show the machine as the suite sees it, and what to mend before trusting a measurement."""
    from resblock_bench.bench import environment, telemetry
    from resblock_bench.bench.checkup import cpu_findings
    from resblock_bench.bench.checkup_gpu import gpu_findings
    from resblock_bench.bench.devices import default_kind
    from resblock_bench.bench.listing import machine
    from resblock_bench.bench.units import parse_duration_s

    found = [*cpu_findings(), *gpu_findings(os.environ)]
    console = _console()
    gathered = environment.gather(environment.usable_cpus())
    console.print(machine(gathered, found))
    if record is not None:
        kind = default_kind()
        probe = telemetry.open_probe(kind, gathered.gpu_uuid, None)
        with contextlib.closing(probe):
            count = telemetry.record(probe, record, parse_duration_s(duration))
        typer.echo(f"{count} readings are in {record}")


MemoryOption = Annotated[
    bool,
    typer.Option("--memory", help="Bytes of published blocks' training steps, on fake tensors."),
]
AccuracyOption = Annotated[
    bool, typer.Option("--accuracy", help="Errors of the kernels against float64, interpreted.")
]
PinsOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Default: results/pins of the repository around here."),
]


def _named(**parts: bool) -> list[str]:
    """The parts whose option was given."""
    return [name for name, given in parts.items() if given]


@app.command()
def check(
    memory: MemoryOption = False,
    accuracy: AccuracyOption = False,
    pins: PinsOption = None,
    format: Annotated[
        str, typer.Option("--format", metavar="table|md|json|junit", help="Of the report.")
    ] = "table",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report here, and the table to the terminal."),
    ] = None,
) -> None:
    """The gate: compare the kernels with their pins, in all parts that this machine can do.

    Worse fails (1), better and changed ask to be saved (4), missing or damaged is invalid (3), and
    what is wrong in itself is 5.
    """
    from resblock_bench.bench import check as checking
    from resblock_bench.bench.report import destination

    request = checking.Request(
        parts=_named(memory=memory, accuracy=accuracy), pins=pins, to=destination(format, output)
    )
    console = _console()
    # A report on the standard output stands alone there.
    alone = format != "table" and output is None
    progress = Console(stderr=True) if alone else console
    raise typer.Exit(checking.carry_out(request, console, progress))


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
    memory: MemoryOption = False,
    accuracy: AccuracyOption = False,
    pins: PinsOption = None,
) -> None:
    """Measure the parts named and pin what they find; what is wrong or invalid is not saved."""
    from resblock_bench.bench import baseline_pins

    names = _named(memory=memory, accuracy=accuracy)
    raise typer.Exit(baseline_pins.save(names, reason, pins, _console()))


@baseline.command()
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="[PART|SUBJECT]", help="Default: everything.")
    ] = None,
    pins: PinsOption = None,
) -> None:
    """When and why each pin was saved; of a subject, its figures."""
    from resblock_bench.bench import baseline_pins

    raise typer.Exit(baseline_pins.show_pins(name, pins, _console()))


@baseline.command()
def diff(
    memory: MemoryOption = False, accuracy: AccuracyOption = False, pins: PinsOption = None
) -> None:
    """Measure, and show what saving would change; the exit code does not judge it."""
    from resblock_bench.bench import baseline_pins

    names = _named(memory=memory, accuracy=accuracy)
    raise typer.Exit(baseline_pins.diff(names, pins, _console()))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: one sentence and exit code 2 for what the user can mend.

    Ctrl-C ends with INCOMPLETE wherever it strikes; 130 is typer's code for it. So does a fault of
    this program, whose traceback is shown: Python's own code for that, 1, means a regression here.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except UsageError as error:
        print(f"resblock-bench: {error}", file=sys.stderr)
        sys.exit(exitcodes.USAGE)
    except InvalidError as error:
        print(f"resblock-bench: {error}", file=sys.stderr)
        sys.exit(exitcodes.INCOMPLETE)
    except SystemExit as ending:
        sys.exit(exitcodes.INCOMPLETE if ending.code == 130 else ending.code)
    except Exception:
        traceback.print_exc()
        sys.exit(exitcodes.INCOMPLETE)
    sys.exit(exitcodes.OK)
