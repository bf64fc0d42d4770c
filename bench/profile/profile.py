"""The verb `profile`: checks and profiles the cells that are named, shows and writes results."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine.channel import Function
from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.proc import available_bytes, last_cpus, usable_cpus
from resblock_bench.bench.machine.process import Ending, Processes
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import CellJob, Task, id_of
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.implementations import unusable_here
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.measure.timing import DEFAULT_RULE
from resblock_bench.bench.measure.truth_file import FIRST, truths_folder
from resblock_bench.bench.records import Cell, Status, cell_name
from resblock_bench.bench.terminal import say

from .figures import save_figures
from .profiles import MEMORY, PROFILE, PROFILES, PROTON, ROOFLINE, TRACE, Profile
from .shown import compared, shown
from .step import ProfileJob, ProfileReply, profile_cell, proton_cell
from .trace import ADVICE


@dataclass(frozen=True)
class ProfileRequest:
    """What was asked for.

    cells      one, or two to compare
    output     the folder in which profiles/ lies
    limit_s    what a process may take
    snapshot   also for PyTorch's memory viewer
    json       a file for the profile, or for both
    """

    cells: Sequence[Cell]
    device: Kind
    output: Path
    threads: int | None
    seed: int
    limit_s: float
    snapshot: bool
    json: Path | None


class ProfilesFile(Struct):
    """What `--json` writes."""

    profiles: list[Profile]


def carry_out(request: ProfileRequest, console: Console) -> int:
    """Profile the cells, one after the other; returns the exit code."""
    _refuse(request)
    found: list[Profile] = []
    with ExitStack() as stack:
        lab = _Lab(request, stack)
        for cell in request.cells:
            reply = lab.profile(cell)
            if reply.profile is None:
                say(console, f"{cell_name(cell)}: {reply.status}: {reply.reason}")
                return _code_of(reply.status)
            found.append(reply.profile)
    for part in compared(*found) if len(found) == 2 else shown(found[0]):
        if isinstance(part, str):
            say(console, part)
        else:
            console.print(part)
    for one in found:
        folder = request.output / PROFILES / one.id
        listed = ", ".join(sorted(path.name for path in folder.iterdir()))
        say(console, f"{folder}: {listed}")
    if any(one.left_out for one in found):
        counts = " and ".join(f"{one.left_out:,}" for one in found)
        say(console, f"{TRACE} has no room for {counts} of the shortest events")
    if request.json is not None:
        files.write(request.json, files.as_json(ProfilesFile(found)), ADVICE, named=True)
    return exitcodes.OK


def _refuse(request: ProfileRequest) -> None:
    """Raises UsageError for what would be found out only after minutes."""
    if request.snapshot and request.device != "cuda":
        raise UsageError(
            "--snapshot is of CUDA's allocator, and this profile is on the CPU: leave it out; "
            "memory.svg and the trace have the memory there, too"
        )
    for cell in request.cells:
        why = unusable_here(cell.impl, request.device)
        if why is not None:
            raise UsageError(f"{cell_name(cell)} cannot be run: {why}")
    if request.json is not None:
        with files.explained(request.json, "name another file with --json"):
            files.check_writable(request.json, named=True)
    with files.explained(request.output, ADVICE):
        files.check_writable(request.output / PROFILES / "x", parents=True)


def _code_of(status: Status) -> int:
    return exitcodes.WRONG if status == "wrong" else exitcodes.INCOMPLETE


class _Lab:
    """The machine, looked at once, and the truths of sites, computed once for their variants."""

    def __init__(self, request: ProfileRequest, stack: ExitStack) -> None:
        self._request = request
        self._variables: dict[str, str] = {}
        if request.device == "cuda":
            gpu = chosen_gpus(())[0].uuid
            stack.enter_context(only_user(gpu))
            self._variables["CUDA_VISIBLE_DEVICES"] = gpu
        self._processes = Processes()
        stack.callback(self._processes.close)
        self._threads = request.threads or usable_cpus()
        self._environment = survey(
            self._processes, SurveyJob(request.device, self._threads), self._variables
        )
        self._scratch = stack.enter_context(scratch_folder())

    def profile(self, cell: Cell) -> ProfileReply:
        """Check and profile a cell, each in a process of its own, and write all but the table."""
        task = self._task(cell)
        folder = self._request.output / PROFILES / id_of(task)
        with files.explained(folder, ADVICE):
            files.make_folder(folder)
        for name in (TRACE, PROFILE, MEMORY, ROOFLINE):
            with files.explained(folder / name, ADVICE):
                files.check_writable(folder / name)
        truths = truths_folder(self._scratch, cell, task.seed)
        if not (truths / FIRST).exists():
            argument = msgspec.json.encode(CellJob(task=task, truths=str(truths)))
            ending = self._run(jobs.compute_site_truths, argument)
            problem = jobs.truth_problem(ending, self._request.limit_s)
            if problem is not None:
                return ProfileReply(status=problem[0], reason=problem[1])
        job = ProfileJob(
            task=task,
            truth=str(truths / FIRST),
            folder=str(folder.resolve()),
            cpus=last_cpus(self._threads) if task.device == "cpu" else [],
            snapshot=self._request.snapshot,
        )
        reply = self._reply(profile_cell, job)
        if reply.profile is not None:
            if task.device == "cuda":
                reply.profile.notes.extend(self._proton(job))
            save_figures(reply.profile, folder)
            files.write(folder / PROFILE, files.as_json(reply.profile), ADVICE)
        return reply

    def _proton(self, job: ProfileJob) -> list[str]:
        """Triton's own profile beside it; a sentence where there is none."""
        reply = self._reply(proton_cell, job)
        return [] if reply.status == "ok" else [f"Triton's {PROTON} did not work: {reply.reason}"]

    def _task(self, cell: Cell) -> Task:
        plan = Plan(
            device=self._request.device,
            rule=DEFAULT_RULE,
            seed=self._request.seed,
            threads=self._threads,
            memory_limit_bytes=None,
            cells=[PlannedCell(cell, 1)],
        )
        (task,) = plan.tasks(self._environment)
        limit = available_bytes() if task.device == "cpu" else None
        return replace(task, memory_limit_bytes=limit)

    def _reply(self, function: Function, job: ProfileJob) -> ProfileReply:
        ending = self._run(function, msgspec.json.encode(job))
        if ending.reply is None:
            status, reason = ending.problem(self._request.limit_s)
            return ProfileReply(status=status, reason=reason)
        return msgspec.json.decode(ending.reply, type=ProfileReply)

    def _run(self, function: Function, argument: bytes) -> Ending:
        return self._processes.run(
            function, argument, limit_s=self._request.limit_s, environment=self._variables
        )
