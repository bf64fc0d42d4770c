"""The ground on which two code bases are compared: the machine, its GPU held, the truths of all
sites, and a server of processes for each side."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.proc import last_cpus, usable_cpus
from resblock_bench.bench.machine.process import Processes, Server
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import CellJob, Task, row_of
from resblock_bench.bench.measure.origin import Origin
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.measure.truth_file import LAST, truths_folder
from resblock_bench.bench.records import Environment

from .party import Ended, Party


class Side:
    """A code base: what its processes are forked from, which has imported it once.

    name     how people call it: a revision, or "the working tree"
    paths    what its Python path begins with; the code that is measured has to lie in one of them,
             if there are any
    root     of another repository, whose modules outside of the paths are refused
    bed      where its processes compute
    """

    def __init__(self, name: str, paths: Sequence[Path], root: Path | None, bed: "Testbed") -> None:
        self.name = name
        self._origin = None
        if paths:
            folders = [str(path) for path in paths]
            self._origin = Origin(folders, "" if root is None else str(root), time.time())
        self._bed = bed
        self._server = Server(paths)
        self._processes = Processes(self._server)
        self.code = ""
        self.fixed_addresses = False

    def start(self) -> None:
        """Import everything. Raises InvalidError where that cannot be done."""
        try:
            told = self._told()
        except InvalidError as error:
            *_, cause = str(error).splitlines()
            raise InvalidError(
                f"{self.name} cannot be imported, so there is nothing to compare: {cause}"
            ) from None
        self.code, self.fixed_addresses = told.code, told.fixed_addresses

    def _told(self) -> jobs.Code:
        ending = self._processes.run(jobs.tell_code, b"", limit_s=self._bed.limit_s)
        if ending.reply is None:
            raise InvalidError(ending.problem(self._bed.limit_s)[1])
        return msgspec.json.decode(ending.reply, type=jobs.Code)

    def begin(self, task: Task) -> Party:
        """A fresh process for a round of a task's cell. Raises Ended."""
        truths = self._bed.truths(task)
        if not self._server.up:
            try:
                code = self._told().code
            except InvalidError as error:
                *_, cause = str(error).splitlines()
                reason = f"{self.name} cannot be imported any more: {cause}"
                raise Ended(row_of(task, "crashed", reason)) from None
            if code != self.code:
                reason = "its files changed meanwhile: compare again"
                raise Ended(row_of(task, "crashed", reason))
        job = CellJob(
            task=task,
            truths=str(truths),
            memory=False,
            cpus=self._bed.cpus,
            origin=self._origin,
        )
        return Party(
            self._processes, job, limit_s=self._bed.limit_s, environment=self._bed.variables
        )

    def close(self) -> None:
        self._processes.close()
        self._server.close()


@dataclass
class Testbed:
    """What is needed to measure the cells of a plan on some sides.

    sides      started, in the order given
    tasks      one a cell, in the plan's order
    notes      on what may make the sides differ that is not their code
    limit_s    what a process may take, seconds
    cpus       that processes compute on; none are any
    variables  of their environment
    """

    environment: Environment
    sides: list[Side]
    tasks: list[Task]
    notes: list[str]
    limit_s: float
    cpus: list[int]
    variables: dict[str, str]
    _processes: Processes
    _folder: Path

    def truths(self, task: Task) -> Path:
        """The folder of a task's truths, which are computed when they are first asked for.

        Raises Ended where they cannot be.
        """
        folder = truths_folder(self._folder, task.cell, task.seed)
        # Written last: a folder without it is of an attempt that failed.
        if not (folder / LAST).exists():
            argument = msgspec.json.encode(CellJob(task=task, truths=str(folder)))
            ending = self._processes.run(
                jobs.compute_site_truths, argument, limit_s=self.limit_s, environment=self.variables
            )
            problem = jobs.truth_problem(ending, self.limit_s)
            if problem is not None:
                raise Ended(row_of(task, *problem))
        return folder


@contextlib.contextmanager
def opened(
    plan: Plan,
    sides: Mapping[str, Sequence[Path]],
    *,
    limit_s: float,
    root: Path | None = None,
) -> Iterator[Testbed]:
    """Survey the machine, hold its GPU, and start the sides.

    sides   by name, what the Python path of each begins with
    root    of another repository that the sides' packages are of

    Raises UsageError where the device cannot be used, InvalidError where a side cannot be imported.
    """
    with ExitStack() as stack:
        variables: dict[str, str] = {}
        if plan.device == "cuda":
            gpu = chosen_gpus(())[0].uuid
            stack.enter_context(only_user(gpu))
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        processes = Processes()
        stack.callback(processes.close)
        threads = plan.threads or usable_cpus()
        found = survey(processes, SurveyJob(plan.device, threads, ceilings=False), variables)
        bed = Testbed(
            environment=found,
            sides=[],
            tasks=plan.tasks(found),
            notes=[],
            limit_s=limit_s,
            cpus=last_cpus(threads) if plan.device == "cpu" else [],
            variables=variables,
            _processes=processes,
            _folder=stack.enter_context(scratch_folder()),
        )
        for name, paths in sides.items():
            bed.sides.append(Side(name, paths, root, bed))
            stack.callback(bed.sides[-1].close)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Side.start, bed.sides))
        bed.notes += _notes(bed.sides)
        yield bed


def _notes(sides: Sequence[Side]) -> list[str]:
    if all(side.fixed_addresses for side in sides):
        return []
    return [
        "this system draws the addresses of each process's memory by lot, which alone can make "
        "them differ by some per cent: allow personality(2), or compare repeatedly"
    ]
