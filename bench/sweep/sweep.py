"""Carries a sweep out: opens or resumes the folder, measures, shows, draws, says how it ended."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from msgspec.structs import replace
from rich.console import Console

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.grid import weight
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine.proc import usable_cpus
from resblock_bench.bench.measure.cell import Task, id_of
from resblock_bench.bench.progress import TaskProgress
from resblock_bench.bench.records import (
    OOM_EXPECTED,
    Environment,
    Row,
    cell_name,
    site_name,
    variant_name,
)
from resblock_bench.bench.report.derived import derive
from resblock_bench.bench.runs import table
from resblock_bench.bench.runs.folder import Run, create_run, default_output, resume_run
from resblock_bench.bench.terminal import say
from resblock_bench.bench.units import counted

from .engines import Block, Engine, LocalEngine
from .flags import require_fitting
from .ray_engine import RayEngine
from .schedule import OomRecord, blocks_of, run_blocks


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as asked for.

    plan                None resumes with the plan of the folder
    output              None is the default folder
    resume              measure what the folder lacks
    retry               and again what failed there
    ignore_oom          try cells that are larger than one which ran out of memory
    memory_limit_bytes  of a CPU cell; None is that of the plan
    devices             of the visible GPUs these, by position or UUID; empty for all
    engine              "local" or "ray"
    accelerator         with "ray", the type of GPU; None where the cluster has one type only
    again               the user's command without what the folder knows
    """

    plan: Plan | None
    output: Path | None
    resume: bool
    retry: bool
    ignore_oom: bool
    memory_limit_bytes: int | None
    timeout_s: float
    budget_s: float | None
    devices: Sequence[str]
    plots: bool
    formats: Sequence[str]
    engine: str
    accelerator: str | None
    again: str = "resblock-bench run"


def carry_out(request: SweepRequest, console: Console) -> int:
    """Measure the cells of a request; returns the exit code.

    Ctrl-C ends the sweep with what was measured so far; the code is then INCOMPLETE, not the
    shell's 130, so that a script sees one code for every run that is not whole.
    """
    with _opened(request, console) as (run, engine):
        tasks = run.plan.tasks(run.environment, folder=run.folder)
        earlier = len(run.attempts)
        rows = _rows_of(tasks, run)
        todo = missing(tasks, rows, retry=request.retry, ignore_oom=request.ignore_oom)
        if request.budget_s is not None and request.resume:
            todo.sort(key=lambda block: weight(block[0].cell, block[0].multiplicity), reverse=True)
        count = sum(map(len, todo))
        say(console, _begin_line(tasks, count, rows, run))
        tried = {id_of(task) for block in todo for task in block}
        oom = OomRecord(row for row in rows.values() if row.id not in tried)
        ending = _measure_all(
            request, todo, engine, None if request.ignore_oom else oom, run, console
        )
        left = count - (len(run.attempts) - earlier)
        if ending is None and left:
            ending = "stopped, since the time budget is spent"
        found = list(_rows_of(tasks, run).values())
        _show(console, found, len(tasks))
        ceilings = run.environment.ceilings
        if ceilings is not None and ceilings.disturbances:
            say(
                console,
                "shares of the floor may be too high: when the machine's ceilings were measured, "
                f"{'; '.join(ceilings.disturbances)}",
            )
        if run.plan.device == "cuda" and ending is None:
            _show_predicted(found, run.environment, console)
        if found:
            derive(console, run.folder, request.formats, plots=request.plots)
        if ending is not None:
            say(
                console,
                f"{ending}: {len(found)} rows are in {run.folder}, {left} cells are left; "
                f"go on with: {request.again} --resume --output {quote(str(run.folder))}",
            )
        return exit_code(found, len(tasks), ending)


@contextmanager
def _opened(request: SweepRequest, console: Console) -> Iterator[tuple[Run, Engine]]:
    """The run folder, begun or gone on with, and what measures its cells."""
    with ExitStack() as stack:
        if request.resume:
            run = stack.enter_context(resume_run(folder_to_resume(request.output)))
            plan = run.plan if request.plan is None else run.plan.joined(request.plan)
            if request.memory_limit_bytes is not None:
                plan = replace(plan, memory_limit_bytes=request.memory_limit_bytes)
            engine = stack.enter_context(closing(_open_engine(request, plan)))
            mended = run.go_on(plan, engine.survey())
            if mended is not None:
                say(console, mended)
        else:
            assert request.plan is not None
            engine = stack.enter_context(closing(_open_engine(request, request.plan)))
            found = engine.survey()
            usual = default_output(found.machine, Path.cwd())
            # Relative, since a page names it in its commands and may be passed on.
            folder = request.output or Path(os.path.relpath(usual))
            run = stack.enter_context(create_run(folder, request.plan, found))
        yield run, engine


def folder_to_resume(output: Path | None) -> Path:
    """The folder that was named. Raises UsageError where none was."""
    if output is None:
        raise UsageError("--resume needs the folder of the run: name it with --output DIR")
    return output


def _open_engine(request: SweepRequest, plan: Plan) -> Engine:
    require_fitting(plan, request.engine, request.devices, request.accelerator)
    threads = plan.threads or usable_cpus()
    if request.engine == "local":
        return LocalEngine(
            plan.device, threads=threads, limit_s=request.timeout_s, devices=request.devices
        )
    return RayEngine(
        plan.device, threads=threads, limit_s=request.timeout_s, accelerator=request.accelerator
    )


def _rows_of(tasks: Iterable[Task], run: Run) -> dict[str, Row]:
    """Of the tasks' cells the last rows, by id; those that other code measured do not count."""
    asked = {id_of(task) for task in tasks}
    return {row.id: row for row in run.attempts if row.id in asked}


def _show(console: Console, rows: Sequence[Row], planned: int) -> None:
    """The table of the rows, what went wrong, and the summary."""
    if rows:
        width = min(console.width, table.WIDTH)
        console.print(table.results_table(rows, width), width=width)
    for line in filter(None, [*table.problems(rows), table.disturbed(rows)]):
        say(console, line)
    say(console, table.summary(rows, planned))


def _show_predicted(rows: list[Row], found: Environment, console: Console) -> None:
    """What was predicted of the fused norms, where Triton is there to compile them."""
    from resblock_bench.kernels.dispatch import triton_installed

    if not triton_installed():
        return
    from resblock_bench.bench.cost import predicted_run
    from resblock_bench.bench.machine.workers import JobFailed

    try:
        predicted_run.show(rows, found.ceilings, console, table.WIDTH)
    except JobFailed as error:  # the rows stand
        say(console, f"nothing is predicted of the norms: {error}")


def _measure_all(
    request: SweepRequest,
    todo: Sequence[Block],
    engine: Engine,
    oom: OomRecord | None,
    run: Run,
    console: Console,
) -> str | None:
    """Why the sweep ended before its last cell, or None."""
    running: dict[Future[list[Row]], Block] = {}
    try:
        with TaskProgress(console, sum(map(len, todo))) as progress:
            rows = run_blocks(
                todo,
                engine,
                oom=oom,
                began=lambda block: progress.begin(_block_name(block)),
                budget_s=request.budget_s,
                running=running,
            )
            for row in rows:
                try:
                    run.append(row)
                except OSError as error:
                    return f"stopped, since {run.folder} cannot be written ({error.strerror})"
                progress.finish(_finished(row))
    except KeyboardInterrupt:
        # Several lanes may have ended blocks whose rows were not all handed out yet.
        for future in [future for future in running if future.done() and not future.exception()]:
            for row in future.result():
                if row not in run.attempts:
                    with suppress(OSError):
                        run.append(row)
        return "interrupted"
    return None


def _finished(row: Row) -> str:
    result: str = row.status
    if row.throughput_images_per_s is not None:
        result = f"{row.throughput_images_per_s:,.1f} images/s"
    return f"{cell_name(row.axes)}: {result}"


def _block_name(block: Block) -> str:
    cell = block[0].cell
    variants = ", ".join(variant_name(task.cell) for task in block)
    return f"{site_name(cell)} {cell.dtype} {cell.layout} {cell.mode}: {variants}"


def missing(
    tasks: Iterable[Task], rows: Mapping[str, Row], *, retry: bool, ignore_oom: bool
) -> list[list[Task]]:
    """Of each block that lacks a row, what is to be measured: with what it lacks all that was
    measured, since only rows of the same rounds compare. Whatever has a row is a further attempt.

    retry        whatever has no measurement is lacking, but for what ran out of memory
    ignore_oom   and what ran out of memory, or was skipped since a smaller cell did; where the
                 task may allocate more than that could, it is lacking in any case
    """

    def lacking(task: Task) -> bool:
        row = rows.get(id_of(task))
        if row is None:
            return True
        no_memory = row.status == "oom" or (row.reason or "").startswith(OOM_EXPECTED)
        if no_memory:
            before, now = row.memory_limit_bytes, task.memory_limit_bytes
            return ignore_oom or (before is not None and now is not None and now > before)
        return retry and row.status != "ok"

    todo: list[list[Task]] = []
    for block in blocks_of(tasks):
        if not any(map(lacking, block)):
            continue
        todo.append([])
        for task in block:
            row = rows.get(id_of(task))
            if row is None:
                todo[-1].append(task)
            elif row.status == "ok" or lacking(task):
                todo[-1].append(replace(task, attempt=row.attempt + 1))
    return todo


def _begin_line(tasks: Sequence[Task], todo: int, rows: Mapping[str, Row], run: Run) -> str:
    found = run.environment
    name = (found.gpu if run.plan.device == "cuda" else found.cpu) or "CPU"
    text = f"{counted(todo, 'cell')} on {name} into {run.folder}"
    if run.attempts:
        text += f", which has {len(rows)} of {len(tasks)}"
    others = len({row.id for row in run.attempts} - rows.keys())
    if others:
        text += f"; {others} rows there were measured by other code and do not count"
    return text


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
