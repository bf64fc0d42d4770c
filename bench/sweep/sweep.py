"""Carries a sweep out: opens or resumes the folder, measures, shows, draws, says how it ended."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.grid.grid import PlannedCell, weight
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine import environment
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure.cell import Task, id_of
from resblock_bench.bench.measure.fingerprint import code_fingerprint
from resblock_bench.bench.progress import TaskProgress
from resblock_bench.bench.records import OOM_EXPECTED, Environment, Row, cell_name
from resblock_bench.bench.runs import table
from resblock_bench.bench.runs.derived import derive
from resblock_bench.bench.runs.folder import (
    RunWriter,
    default_output,
    read_environment,
    read_plan,
    read_rows,
)
from resblock_bench.bench.terminal import say

from .engines import Engine, LocalEngine
from .ray_engine import RayEngine
from .runner import OomRecord, run_tasks

TIMEOUT_S = 300.0
"""What a cell may take unless said otherwise: compiling one takes up to a minute."""


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as asked for.

    plan         None resumes with the plan of the folder
    output       None is the default folder
    resume       measure what the folder lacks
    retry        and again what failed there
    ignore_oom   try cells that are larger than one which ran out of memory
    devices      of the visible GPUs these, by position or UUID; empty for all
    engine       "local" or "ray"
    accelerator  with "ray", the type of GPU; None where the cluster has one type only
    """

    plan: Plan | None
    output: Path | None = None
    resume: bool = False
    retry: bool = False
    ignore_oom: bool = False
    timeout_s: float = TIMEOUT_S
    budget_s: float | None = None
    devices: Sequence[str] = ()
    plots: bool = True
    formats: Sequence[str] = ()
    engine: str = "local"
    accelerator: str | None = None


def carry_out(request: SweepRequest, console: Console) -> int:
    """Measure the cells of a request; returns the exit code.

    Ctrl-C ends the sweep with what was measured so far; the code is then INCOMPLETE, not the
    shell's 130, so that a script sees one code for every run that is not whole.
    """
    with ExitStack() as stack:
        earlier: list[Row] = []
        if request.resume:
            writer, plan = stack.enter_context(_reopened(request))
            earlier = read_rows(writer.folder)
            before = read_environment(writer.folder)
            engine = stack.enter_context(closing(_engine(request, plan)))
            found = engine.survey()
            _check_machine(writer.folder, before, found)
            found = replace(found, ceilings=before.ceilings)
            # Only now: of a folder that is refused nothing is touched.
            repaired = writer.repair()
            if repaired is not None:
                say(console, repaired)
        else:
            assert request.plan is not None
            plan = request.plan
            engine = stack.enter_context(closing(_engine(request, plan)))
            found = engine.survey()
            folder = request.output or default_output(found.machine, Path.cwd())
            writer = stack.enter_context(RunWriter(folder))
        writer.describe(plan, found)
        return _sweep(request, plan, found, engine, writer, earlier, console)


def _engine(request: SweepRequest, plan: Plan) -> Engine:
    """The engine that a request names."""
    threads = plan.threads or environment.usable_cpus()
    if plan.device == "cpu" and request.devices:
        raise UsageError("--devices names GPUs, and this run measures on the CPU: leave it out")
    if plan.device == "cuda" and plan.memory_limit_bytes is not None:
        raise UsageError("--memory-limit is for cells on a CPU: leave it out")
    if request.engine == "local":
        if request.accelerator is not None:
            raise UsageError("--accelerator goes with --engine ray: name local GPUs with --devices")
        gpus = [gpu.uuid for gpu in chosen_gpus(request.devices)] if plan.device == "cuda" else []
        return LocalEngine(gpus, threads=threads, limit_s=request.timeout_s)
    if request.engine != "ray":
        raise unknown("engine", request.engine, ("local", "ray"))
    if request.devices:
        raise UsageError(
            "--devices names GPUs of this machine, and --engine ray finds its own: leave it out, "
            "or choose a type of GPU with --accelerator"
        )
    return RayEngine(
        plan.device,
        threads=threads,
        limit_s=request.timeout_s,
        accelerator=request.accelerator,
    )


def folder_to_resume(output: Path | None) -> Path:
    """The folder that was named. Raises UsageError where none was."""
    if output is None:
        raise UsageError("--resume needs the folder of the run: name it with --output DIR")
    return output


@contextmanager
def _reopened(request: SweepRequest) -> Iterator[tuple[RunWriter, Plan]]:
    """The folder of an earlier run, with its plan and the cells of the request."""
    folder = folder_to_resume(request.output)
    with RunWriter(folder, resume=True) as writer:
        plan = read_plan(folder)
        if request.plan is not None:
            plan = plan.joined(request.plan)
        yield writer, plan


def _check_machine(folder: Path, earlier: Environment, found: Environment) -> None:
    differs = environment.difference(earlier, found)
    if differs is not None:
        raise UsageError(
            f"{folder} was measured on another machine or with other software ({differs}): "
            "resume it there, or begin a new run with another --output"
        )


def _sweep(
    request: SweepRequest,
    plan: Plan,
    found: Environment,
    engine: Engine,
    writer: RunWriter,
    earlier: list[Row],
    console: Console,
) -> int:
    tasks = plan.tasks(found, folder=writer.folder)
    asked = {id_of(task) for task in tasks}
    rows = {row.id: row for row in earlier if row.id in asked}
    todo = missing(tasks, rows, retry=request.retry, ignore_oom=request.ignore_oom)
    if request.budget_s is not None and request.resume:
        todo.sort(key=lambda task: weight(PlannedCell(task.cell, task.multiplicity)), reverse=True)
    say(console, _begin_line(tasks, todo, earlier, rows, writer.folder))
    oom = None if request.ignore_oom else OomRecord(rows.values())
    ending = _measure_all(request, todo, engine, oom, writer, console)
    left = len(todo) - writer.count
    # Read back, since an interrupt may have come between a row and the note of it.
    rows = {row.id: row for row in read_rows(writer.folder) if row.id in asked}
    if ending is None and left:
        ending = "stopped, since the time budget is spent"
    _show(console, list(rows.values()), len(tasks))
    if plan.device == "cuda" and ending is None:
        _show_predicted(list(rows.values()), found, console)
    if rows:
        derive(console, writer.folder, request.formats, plots=request.plots)
    if ending is not None:
        engine_options = "" if request.engine == "local" else f" --engine {request.engine}"
        if request.accelerator is not None:
            engine_options += f" --accelerator {request.accelerator}"
        say(
            console,
            f"{ending}: {len(rows)} rows are in {writer.folder}, {left} cells are left; "
            f"go on with: resblock-bench run{engine_options} --resume --output {writer.folder}",
        )
    return exit_code(list(rows.values()), len(tasks), ending)


def _show(console: Console, rows: Sequence[Row], planned: int) -> None:
    """The table of the rows, what went wrong, and the summary."""
    if rows:
        width = min(console.width, table.WIDTH)
        console.print(table.results_table(rows), width=width)
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
    todo: Sequence[Task],
    engine: Engine,
    oom: OomRecord | None,
    writer: RunWriter,
    console: Console,
) -> str | None:
    """Why the sweep ended before its last cell, or None."""
    running: dict[Future[Row], Task] = {}
    try:
        with TaskProgress(console, len(todo)) as progress:
            rows = run_tasks(
                todo,
                engine,
                oom=oom,
                began=lambda cell: progress.begin(cell_name(cell)),
                budget_s=request.budget_s,
                running=running,
            )
            for row in rows:
                try:
                    writer.append(row)
                except OSError as error:
                    return f"stopped, since {writer.folder} cannot be written ({error.strerror})"
                progress.finish(_finished(row))
    except KeyboardInterrupt:
        # Several lanes may have ended cells whose rows were not handed out yet.
        for future in [future for future in running if future.done() and not future.exception()]:
            with suppress(OSError):
                writer.append(future.result())
        return "interrupted"
    return None


def _finished(row: Row) -> str:
    result: str = row.status
    if row.throughput_images_per_s is not None:
        result = f"{row.throughput_images_per_s:,.1f} images/s"
    return f"{cell_name(row.axes)}: {result}"


def missing(
    tasks: Iterable[Task], rows: Mapping[str, Row], *, retry: bool, ignore_oom: bool
) -> list[Task]:
    """The tasks that have no row yet, by id; those to be tried again as a further attempt.

    retry        whatever has no measurement, but for what ran out of memory
    ignore_oom   what ran out of memory, or was skipped since a smaller cell did
    """
    todo = []
    for task in tasks:
        row = rows.get(id_of(task))
        if row is None:
            todo.append(task)
            continue
        no_memory = row.status == "oom" or (row.reason or "").startswith(OOM_EXPECTED)
        again = ignore_oom if no_memory else retry and row.status != "ok"
        if again:
            todo.append(replace(task, attempt=row.attempt + 1))
    return todo


def _begin_line(
    tasks: Sequence[Task],
    todo: Sequence[Task],
    earlier: Sequence[Row],
    rows: Mapping[str, Row],
    folder: Path,
) -> str:
    kind, found = tasks[0].device, tasks[0].environment
    name = (found.gpu if kind == "cuda" else found.cpu) or "CPU"
    text = f"{len(todo)} cells on {name} into {folder}"
    if earlier:
        text += f", which has {len(rows)} of {len(tasks)}"
    others = len({row.id for row in earlier} - rows.keys())
    if others:
        text += (
            f"; {others} rows there were measured by other code (this is {code_fingerprint()}) "
            "and do not count"
        )
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
