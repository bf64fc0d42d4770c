"""The verb `plan`: from the command line's words to what is shown, written and drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.records import Checkpoint
from resblock_bench.bench.terminal import say
from resblock_bench.bench.units import parse_bytes

from .equal_memory import begun, completed, wanted
from .figure import draw_equal_memory, draw_peaks, save
from .peaks import MOST_IMAGES
from .plans import CHECKPOINTS, IMPLS, MemoryPlan, PlanRequest, memory_plan
from .report import shown, shown_equal_memory
from .subject import Subject
from .training import Impl, Optimizer, Precision, published_precision

_LEAST_DEVICE, _MOST_DEVICE = 2**20, 2**50
_ADVICE = "name another file"


def request_of(
    subject: Subject,
    *,
    batch: int,
    dtype: str,
    optimizer: str,
    ema: bool,
    recompute_attention: bool,
    microbatch: int | None,
    impl: str | None,
    checkpoint: str | None,
    device_memory: str | None,
    json: Path | None,
    plot: Path | None,
) -> PlanRequest:
    """The request of the command line's words. Raises UsageError."""
    for name, count in (("--batch", batch), ("--microbatch", microbatch)):
        if count is not None and not 1 <= count <= MOST_IMAGES:
            raise UsageError(f"{name} is {count}: images a step are 1 to {MOST_IMAGES:,}")
    if microbatch is not None and microbatch > batch:
        raise UsageError(
            f"--microbatch is {microbatch} and --batch {batch}: a part is not larger than the whole"
        )
    if dtype not in (*get_args(Precision), "published"):
        raise unknown("dtype", dtype, ("published", *get_args(Precision)))
    if optimizer not in get_args(Optimizer):
        raise unknown("optimizer", optimizer, get_args(Optimizer))
    if recompute_attention and subject.config is None:
        raise UsageError(
            f"--recompute-attention: {subject.name} has no attention block of this suite to "
            "compute again: leave it out"
        )
    device_bytes = None if device_memory is None else parse_bytes(device_memory)
    if device_bytes is not None and not _LEAST_DEVICE <= device_bytes <= _MOST_DEVICE:
        raise UsageError(f"--device-memory {device_memory}: devices have 1 MiB to 1048576 GiB")
    for path in (json, plot):
        if path is not None:
            with files.explained(path, _ADVICE):
                files.check_writable(path, named=True)
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {plot} is no PNG or SVG by its name: end it in .png or .svg")
    published: Precision = "fp32" if subject.config is None else published_precision(subject.config)
    return PlanRequest(
        subject=subject,
        precision=msgspec.convert(published if dtype == "published" else dtype, Precision),
        batch=batch,
        microbatch=microbatch,
        optimizer=msgspec.convert(optimizer, Optimizer),
        ema=ema,
        recompute_attention=recompute_attention,
        impls=msgspec.convert(_chosen("implementation", impl, IMPLS), list[Impl]),
        checkpoints=msgspec.convert(
            _chosen("checkpoint mode", checkpoint, CHECKPOINTS), list[Checkpoint]
        ),
        device_bytes=device_bytes,
        json=json,
        plot=plot,
    )


def carry_out(request: PlanRequest, console: Console, progress: Console) -> int:
    """Plan everything asked for, show it, write it. Returns the exit code."""
    found = memory_plan(request, progress)
    for part in shown(found, request):
        if isinstance(part, str):
            say(console, part)
        else:
            console.print(part)
    if request.json is not None:
        files.write(request.json, files.as_json(found), _ADVICE, named=True)
        say(console, f"json: {request.json}")
    if request.plot is not None and found.variants:
        save(draw_peaks(found), request.plot, _ADVICE)
        say(console, f"figure: {request.plot}")
    return exit_code(found)


def exit_code(found: MemoryPlan) -> int:
    """Whether any planned variant fits into the largest device."""
    if found.interrupted or found.failures or not found.variants:
        return exitcodes.INCOMPLETE
    least = min(plan.peak.bytes for plan in found.variants)
    return exitcodes.OK if least <= max(found.devices) else exitcodes.TOO_LARGE


def carry_out_published(
    json: Path | None, plot: Path | None, console: Console, progress: Console
) -> int:
    """Plan what is missing, show the table, draw it. Returns the exit code."""
    for path in (json, plot):
        if path is not None:
            with files.explained(path, _ADVICE):
                files.check_writable(path, named=True)
    table, ended = completed(begun(json), json, progress)
    for line in shown_equal_memory(table):
        if isinstance(line, str):
            say(console, line)
        else:
            console.print(line)
    if plot is not None and table.rows:
        save(draw_equal_memory(table), plot, _ADVICE)
        say(console, f"figure: {plot}")
    missing = sum(1 for _ in wanted()) - len(table.rows)
    if missing:
        how = "interrupted" if ended else "done"
        say(console, f"{how}: {missing} variants are missing; the same command goes on")
    return exitcodes.INCOMPLETE if missing else exitcodes.OK


def _chosen(kind: str, given: str | None, allowed: Sequence[str]) -> list[str]:
    """Those of a comma list, or all."""
    if given is None:
        return list(allowed)
    chosen = list(dict.fromkeys(part.strip() for part in given.split(",")))
    for name in chosen:
        if name not in allowed:
            raise unknown(kind, name, allowed)
    return chosen
