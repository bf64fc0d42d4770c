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
from resblock_bench.bench.machine.process import Ending, Process, Processes
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

_JSON_ADVICE = "name another file with --json"


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


class _Unprofiled(Exception):
    """A cell that has no profile: the status of a row, and why."""

    def __init__(self, cell: Cell, status: Status, reason: str | None) -> None:
        super().__init__(f"{cell_name(cell)}: {status}: {reason}")
        self.code = exitcodes.WRONG if status == "wrong" else exitcodes.INCOMPLETE


def carry_out(request: ProfileRequest, console: Console) -> int:
    """Profile the cells, show and write what was found; returns the exit code."""
    _refuse(request)
    try:
        with ExitStack() as stack:
            found = _Lab(request, stack).profiles()
    except _Unprofiled as error:
        say(console, str(error))
        return error.code
    for part in compared(*found) if len(found) == 2 else shown(found[0]):
        if isinstance(part, str):
            say(console, part)
        else:
            console.print(part)
    for one in found:
        folder = request.output / PROFILES / one.id
        listed = ", ".join(sorted(path.name for path in folder.iterdir()))
        say(console, f"{folder}: {listed}")
    if request.json is not None:
        files.write(request.json, files.as_json(ProfilesFile(found)), _JSON_ADVICE, named=True)
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
        with files.explained(request.json, _JSON_ADVICE):
            files.check_writable(request.json, named=True)
    with files.explained(request.output, ADVICE):
        files.check_writable(request.output / PROFILES / PROFILE, parents=True)


class _Lab:
    """The machine, looked at once, and processes on it."""

    def __init__(self, request: ProfileRequest, stack: ExitStack) -> None:
        self._request = request
        self._variables: dict[str, str] = {}
        if request.device == "cuda":
            gpu = chosen_gpus(())[0].uuid
            stack.enter_context(only_user(gpu))
            self._variables["CUDA_VISIBLE_DEVICES"] = gpu
        self._processes = Processes()
        stack.callback(self._processes.close)
        threads = request.threads or usable_cpus()
        self._cpus = last_cpus(threads) if request.device == "cpu" else []
        environment = survey(self._processes, SurveyJob(request.device, threads), self._variables)
        plan = Plan(
            device=request.device,
            rule=DEFAULT_RULE,
            seed=request.seed,
            threads=threads,
            memory_limit_bytes=None,
            cells=[PlannedCell(cell, 1) for cell in request.cells],
        )
        self._tasks = plan.tasks(environment)
        self._scratch = stack.enter_context(scratch_folder())

    def profiles(self) -> list[Profile]:
        """Check and profile the cells, each in a process of its own, which take turns, step by
        step, so that what the machine does meanwhile falls on both; write all but what is shown.

        Raises _Unprofiled for the first that cannot be.
        """
        for task in self._tasks:
            self._check_folder(task)
        truths = [self._truth(task) for task in self._tasks]
        jobs_, running = [], []
        for task, truth in zip(self._tasks, truths, strict=True):
            if task.device == "cpu":
                task = replace(task, memory_limit_bytes=available_bytes())
            job = ProfileJob(
                task=task,
                truth=str(truth),
                folder=str(self._folder(task).resolve()),
                cpus=self._cpus,
                alone=len(self._tasks) == 1,
                snapshot=self._request.snapshot,
            )
            jobs_.append(job)
            running.append(self._start(profile_cell, job))
            if running[-1].receive(self._request.limit_s) is None:
                self._profile(job, running[-1].finish(0))
        self._take_turns(running)
        endings = [process.finish(self._request.limit_s) for process in running]
        return [self._profile(job, ending) for job, ending in zip(jobs_, endings, strict=True)]

    def _take_turns(self, processes: Sequence[Process]) -> None:
        """Let one after the other go on to its next step, until all have said all they have to."""
        waiting = list(processes)
        while waiting:
            for process in list(waiting):
                process.send(b"")
                if process.receive(self._request.limit_s) is None:
                    waiting.remove(process)

    def _profile(self, job: ProfileJob, ending: Ending) -> Profile:
        """What a process has found, written."""
        reply = self._reply(ending)
        found, folder = reply.profile, Path(job.folder)
        if found is None:
            raise _Unprofiled(job.task.cell, reply.status, reply.reason)
        if job.task.device == "cuda":
            proton = self._reply(self._start(proton_cell, job).finish(self._request.limit_s))
            if proton.status != "ok":
                found.notes.append(f"Triton's {PROTON} did not work: {proton.reason}")
        save_figures(found, folder)
        files.write(folder / PROFILE, files.as_json(found), ADVICE)
        return found

    def _folder(self, task: Task) -> Path:
        return self._request.output / PROFILES / id_of(task)

    def _check_folder(self, task: Task) -> None:
        folder = self._folder(task)
        with files.explained(folder, ADVICE):
            files.make_folder(folder)
        for path in (folder / name for name in (TRACE, PROFILE, MEMORY, ROOFLINE)):
            with files.explained(path, ADVICE):
                files.check_writable(path)

    def _truth(self, task: Task) -> Path:
        """The file of a site's truth, computed once for all its variants."""
        folder = truths_folder(self._scratch, task.cell, task.seed)
        if not (folder / FIRST).exists():
            job = CellJob(task=task, truths=str(folder))
            ending = self._start(jobs.compute_site_truths, job).finish(self._request.limit_s)
            problem = jobs.truth_problem(ending, self._request.limit_s)
            if problem is not None:
                raise _Unprofiled(task.cell, *problem)
        return folder / FIRST

    def _start(self, function: Function, job: Struct) -> Process:
        return self._processes.start(
            function, msgspec.json.encode(job), environment=self._variables
        )

    def _reply(self, ending: Ending) -> ProfileReply:
        if ending.reply is None:
            status, reason = ending.problem(self._request.limit_s)
            return ProfileReply(status=status, reason=reason)
        return msgspec.json.decode(ending.reply, type=ProfileReply)
