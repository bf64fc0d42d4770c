"""The command line: `resblock-bench VERB`, also `python -m resblock_bench.bench VERB`.

Verbs import what they need themselves, so that --help does not wait for PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.terminal import say, terminable, visible

from . import gate, gpu  # noqa: F401  add their verbs
from .app import (
    MOST_SEED,
    AxisOption,
    BudgetOption,
    ConfigOption,
    DeviceOption,
    PresetOption,
    SeedOption,
    ThreadsOption,
    TimeoutOption,
    app,
    checked_threads,
    path,
    progress_console,
    proposed,
    refuse,
    require_text,
    result_console,
)

if TYPE_CHECKING:
    from rich.console import Console

    from resblock_bench.bench.grid.grid import PlannedCell

_OF_THE_PLAN = ("device", "seed", "samples", "max_time", "threads", "memory_limit")
"""Options that a run folder keeps."""
_DIGITS = 9  # of an architecture
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Errors of the operating system that are no fault of this program."""


@app.command()
def run(
    context: typer.Context,
    axis: AxisOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Default: results/runs/MACHINE/RUN under the checkout.",
        ),
    ] = None,
    time_budget: BudgetOption = None,
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
    max_time: Annotated[
        str | None, typer.Option(metavar="1s", help="Limit on sampling one cell.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, help="Take exactly this many samples of each cell."),
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
    """Measure residual blocks or whole models; with no argument, this machine's default preset.

    Writes a run folder (cells.jsonl, environment.json, figures, a page), prints a table. Ctrl-C
    keeps what was measured and exits with 3.
    """
    from msgspec.structs import replace

    from resblock_bench.bench.grid.grid import plan
    from resblock_bench.bench.grid.plan import Plan
    from resblock_bench.bench.grid.presets import choose
    from resblock_bench.bench.measure.devices import default_kind, device_kind
    from resblock_bench.bench.runs.export import parse_formats
    from resblock_bench.bench.runs.folder import read_run
    from resblock_bench.bench.sweep.flags import require_fitting
    from resblock_bench.bench.sweep.sweep import SweepRequest, carry_out, folder_to_resume
    from resblock_bench.bench.units import parse_bytes, parse_duration_s

    if retry_failed and not resume:
        raise UsageError("--retry-failed goes with --resume: it looks at the rows of that run")
    budget_s = None if time_budget is None else parse_duration_s(time_budget)
    timeout_s = parse_duration_s(timeout)
    gpus = () if devices is None else devices.split(",")
    exported = () if formats is None else parse_formats(formats)
    asked: Plan | None = None
    # An earlier run knows its own cells, unless some are named.
    if not resume or axis or preset or config:
        kind = None if device is None else device_kind(device)
        sweep = choose(axis or [], preset, config, kind or default_kind())
        rule = sweep.settings.rule()
        if max_time is not None:
            rule = replace(rule, max_time_s=parse_duration_s(max_time))
        if samples is not None:
            rule = replace(rule, min_samples=samples, max_samples=samples)
        asked = Plan(
            device=kind or sweep.device or default_kind(),
            rule=rule,
            seed=seed or 0,
            threads=checked_threads(threads, engine),
            memory_limit_bytes=None if memory_limit is None else parse_bytes(memory_limit),
            cells=plan(sweep.grids, by_value=budget_s is not None),
        )
    else:
        fixed = [name for name in _OF_THE_PLAN if name != "memory_limit"]
        refuse(context, fixed, "is set by the run that is resumed: leave it out")
    console = result_console()
    planned = asked
    if dry_run and resume:
        earlier = read_run(folder_to_resume(output)).plan
        planned = earlier if asked is None else earlier.joined(asked)
    if planned is not None:
        require_fitting(planned, engine, gpus, accelerator)
        if dry_run:
            raise typer.Exit(_show_cells(planned.cells, console))
    request = SweepRequest(
        plan=asked,
        output=output,
        resume=resume,
        retry=retry_failed,
        ignore_oom=ignore_oom_record,
        memory_limit_bytes=None if memory_limit is None else parse_bytes(memory_limit),
        timeout_s=timeout_s,
        budget_s=budget_s,
        devices=gpus,
        plots=not no_plots,
        formats=exported,
        engine=engine,
        accelerator=accelerator,
        again=proposed(
            context, without=("axis", "preset", "config", "output", "resume", *_OF_THE_PLAN)
        ),
    )
    raise typer.Exit(carry_out(request, console))


@app.command("list")
def list_(
    axis: AxisOption = None, preset: PresetOption = None, config: ConfigOption = None
) -> None:
    """Show presets, axes, implementations and models; with a selection, its cells and bytes."""
    from resblock_bench.bench.grid.grid import plan
    from resblock_bench.bench.grid.presets import choose
    from resblock_bench.bench.measure.devices import default_kind

    from .listing import choices

    console = result_console()
    if axis or preset or config:
        sweep = choose(axis or [], preset, config, default_kind())
        raise typer.Exit(_show_cells(plan(sweep.grids), console))
    console.print(choices())


def _show_cells(planned: Sequence[PlannedCell], console: Console) -> int:
    from .listing import planned_cells

    shown, whole = planned_cells(planned, progress_console())
    console.print(shown)
    return exitcodes.OK if whole else exitcodes.INCOMPLETE


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(parser=path, metavar="RUN...", help="Run folders.")],
) -> None:
    """Draw the figures of run folders again, into their figures/."""
    from resblock_bench.bench.runs.folder import read_run
    from resblock_bench.bench.runs.plots import draw_all

    for run_ in [read_run(folder) for folder in runs]:
        for note in run_.notes:
            say(progress_console(), note)
        paths = draw_all(run_)
        if not paths:
            raise UsageError(f"{run_.folder} holds no measured cell: there is nothing to draw")
        for drawn in paths:
            say(result_console(), str(drawn))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(parser=path, metavar="RUN...", help="Run folders.")],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="FILE", help="Default, for one run: report.html in its folder."
        ),
    ] = None,
) -> None:
    """Write a page of run folders: one HTML file, to be opened or sent, that loads nothing.

    What to believe, the headline, figures, every cell in a table to sort and filter, what went
    wrong, the machine and the method.
    """
    from resblock_bench.bench.report.page import write_page
    from resblock_bench.bench.runs.folder import read_run

    found = [read_run(folder) for folder in runs]
    for run_ in found:
        for note in run_.notes:
            say(progress_console(), note)
    written = write_page(found, output)
    # A file that was named may be the standard output.
    say(result_console() if output is None else progress_console(), str(written))


@app.command()
def cost(
    axis: AxisOption = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="80,90,100",
            help="NVIDIA architectures, as compute capability·10: all, or 90 with --published.",
        ),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(metavar="A|B|C|D", help="Cost this tier, not the one that would be chosen."),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="All blocks of all published models, EDM's as well, at a batch, dtype and layout: "
            "their share of the floor, and what loses most.",
        ),
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", parser=path, metavar="FILE", help="Write every number here, too."),
    ] = None,
) -> None:
    """Show what the kernels cost, with no GPU: bytes, sectors, registers, spills, instructions.

    And a predicted time beside eager's and torch.compile's, with what bounds it. Both norms of the
    selected blocks, at a batch of 8 by default; without axes, one site a tier.
    """
    from resblock_bench.bench.cost import cost as costs
    from resblock_bench.bench.grid.axes import parse_arguments

    names = ("90" if published else "80,90,100") if arch is None else arch
    archs = names.replace("sm_", "").split(",")
    for name in archs:
        if not name.strip().isdecimal() or len(name) > _DIGITS:
            raise UsageError(f"--arch {arch!r} is no list of architectures: write 80,90,100")
    selection = parse_arguments(axis or [])
    default = costs.MODELS_DEFAULT if published or "model" in selection else costs.DEFAULT
    request = costs.CostRequest(
        selection={**default, **selection},
        published=published,
        archs=list(dict.fromkeys(map(int, archs))),
        tier=None if tier is None else costs.tier_named(tier),
        json=json,
    )
    raise typer.Exit(costs.carry_out(request, result_console()))


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A published model (see 'resblock-bench list'), a TOML file of a UNetConfig, or a "
            "config.json of diffusers.",
        ),
    ] = None,
    axis: AxisOption = None,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 8,
    microbatch: Annotated[
        int | None, typer.Option(help="Images a pass, whose gradients are summed up.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="published|fp32|bf16|fp16",
            help="As the model was trained; bf16 is autocast, fp16 ADM's mode with masters.",
        ),
    ] = "published",
    optimizer: Annotated[
        str, typer.Option(metavar="adamw|none", help="Its states, and their step.")
    ] = "adamw",
    ema: Annotated[
        bool, typer.Option("--ema", help="With a moving average of the weights.")
    ] = False,
    recompute_attention: Annotated[
        bool,
        typer.Option(
            "--recompute-attention",
            help="In every checkpoint mode, as ADM's code does; full always does.",
        ),
    ] = False,
    impl: Annotated[
        str | None, typer.Option(metavar="reference,fused", help="Plan these only.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="none,selective,full", help="Plan these only.")
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(metavar="24GiB", help="Of the device. Default: 16, 24, 40, 80 and 141 GiB."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", parser=path, metavar="FILE", help="Write every number here, too."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="FILE.png", help="Draw the peak over the batch, with the devices."
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="The table of all published models instead, as they were trained; with --json it "
            "is kept there after every variant, and taken up again.",
        ),
    ] = False,
) -> None:
    """Say whether a training step fits, which batch would, and the cheapest change that helps.

    Of a whole model or a block, on fake tensors: nothing is computed and no GPU is needed. Exit
    code 1 where none of the planned variants fits into the device, or the largest of the five.
    """
    from resblock_bench.bench.fit import plan as planning
    from resblock_bench.bench.fit.subject import read_subject

    console, progress = result_console(), progress_console()
    if published:
        own = ("model", "axis", "batch", "microbatch", "dtype", "optimizer", "ema")
        why = "is fixed by --published, which plans every model as it was trained: leave it out"
        others = ("recompute_attention", "impl", "checkpoint", "device_memory")
        refuse(context, (*own, *others), why)
        raise typer.Exit(planning.carry_out_published(json, plot, console, progress))
    request = planning.request_of(
        read_subject(model, axis or []),
        batch=batch,
        dtype=dtype,
        optimizer=optimizer,
        ema=ema,
        recompute_attention=recompute_attention,
        microbatch=microbatch,
        impl=impl,
        checkpoint=checkpoint,
        device_memory=device_memory,
        json=json,
        plot=plot,
    )
    raise typer.Exit(planning.carry_out(request, console, progress))


@app.command()
def profile(
    cells: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CELL",
            help="The id of a row, or axes such as 'channels=128 impl=fused'; two are compared.",
        ),
    ] = None,
    axis: AxisOption = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Where profiles/ID is written, such as a run folder. Default: results.",
        ),
    ] = None,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Also for PyTorch's memory viewer, on CUDA.")
    ] = False,
    timeout: TimeoutOption = "30m",
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", parser=path, metavar="FILE", help="Write every number here, too."),
    ] = None,
) -> None:
    """Show where the time and the memory of one step go: a block's, or a whole model's.

    By kernel, group, module and pass, with bytes, operations and rooflines; writes a trace for
    Perfetto and figures. The results are checked first. Of two cells: where the difference is.
    """
    from resblock_bench.bench.checkout import checkout_around
    from resblock_bench.bench.measure.devices import default_kind, device_kind
    from resblock_bench.bench.profile import profile as profiling
    from resblock_bench.bench.profile.selecting import selected
    from resblock_bench.bench.units import parse_duration_s

    request = profiling.ProfileRequest(
        cells=selected(cells or [], axis or [], output, Path.cwd()),
        device=default_kind() if device is None else device_kind(device),
        output=output or checkout_around(Path.cwd()) / "results",
        threads=checked_threads(threads),
        seed=seed or 0,
        limit_s=parse_duration_s(timeout),
        snapshot=snapshot,
        json=json,
    )
    raise typer.Exit(profiling.carry_out(request, result_console()))


@app.command()
def tune(
    axis: AxisOption = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Default: the table that the kernels read."),
    ] = None,
    time_budget: BudgetOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the inputs.")] = 0,
) -> None:
    """Measure launch choices on this GPU, and write the table that the kernels read.

    The norms of the selected blocks, heaviest first; by default those of the published models in
    bf16. Wrong choices are refused; the table is written after every bucket.
    """
    from resblock_bench.bench.tune import tune as tuning
    from resblock_bench.bench.tune.choices import select
    from resblock_bench.bench.units import parse_duration_s

    request = tuning.TuneRequest(
        planned=select(axis or []),
        output=output,
        budget_s=None if time_budget is None else parse_duration_s(time_budget),
        seed=seed,
    )
    raise typer.Exit(tuning.tune(request, result_console()))


@app.command()
def env() -> None:
    """Show the machine as the suite sees it, and what to mend before trusting a measurement."""
    from resblock_bench.bench.machine import environment
    from resblock_bench.bench.machine.checkup import cpu_facts, versions_fact
    from resblock_bench.bench.machine.checkup_gpu import gpu_facts
    from resblock_bench.bench.machine.proc import usable_cpus

    from .listing import machine

    found = [versions_fact(), *cpu_facts(), *gpu_facts(os.environ)]
    gathered = environment.gather(usable_cpus())
    result_console().print(machine(gathered, found))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: one sentence and exit code 2 for what the user can mend.

    Ctrl-C and SIGTERM end with INCOMPLETE wherever they strike; 130 is typer's code for them. So
    does a fault of this program, whose traceback is shown, and a reader who has gone: the code that
    Python and typer have for these, 1, means a regression here.
    """
    _prepare_streams()
    try:
        with terminable():
            words = sys.argv[1:] if arguments is None else list(arguments)
            require_text(words)
            app(args=words)
    except UsageError as error:
        print(visible(f"resblock-bench: {error}"), file=sys.stderr)
        sys.exit(exitcodes.USAGE)
    except InvalidError as error:
        print(visible(f"resblock-bench: {error}"), file=sys.stderr)
        sys.exit(exitcodes.INCOMPLETE)
    except SystemExit as ending:
        if ending.code == 130:
            text = "interrupted: nothing is stored but what is said above"
        elif ending.code == 1 and not isinstance(ending.__context__, typer.Exit):
            text = "ended before it was done, since its output was closed: have it read to the end"
        else:
            raise
        with contextlib.suppress(OSError):
            print(f"resblock-bench: {text}", file=sys.stderr)
        sys.exit(exitcodes.INCOMPLETE)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            text = (
                f"ended before it was done, since its output cannot be written ({error.strerror})"
            )
            print(f"resblock-bench: {text}: make room for it", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            text = f"ended before it was done: {error.filename or 'a file'}: {error.strerror}"
            print(visible(f"resblock-bench: {text}"), file=sys.stderr)
        else:
            traceback.print_exc()
        sys.exit(exitcodes.INCOMPLETE)
    sys.exit(exitcodes.OK)


def _prepare_streams() -> None:
    """What a stream cannot encode is replaced, and what stands for a closed one is /dev/null: in
    this process and those it starts, no other file takes its number."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
