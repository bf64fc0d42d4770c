"""The ground on which sides are compared: the machine, its GPU held, the truths of all sites."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.proc import usable_cpus
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.measure.truth_file import truth_path
from resblock_bench.bench.records import Environment

from .rounds import RoundError
from .sides import Side


@dataclass
class Testbed:
    """What is needed to measure the cells of a plan on some sides.

    sides      started, in the order given
    tasks      one a cell, in the plan's order
    notes      on what may make the sides differ that is not their code
    """

    environment: Environment
    sides: list[Side]
    tasks: list[Task]
    notes: list[str]
    _processes: Processes
    _folder: Path
    _limit_s: float

    def truth(self, task: Task) -> Path:
        """The file of a task's truth, which is computed when it is first asked for.

        Raises RoundError where it cannot be.
        """
        path = truth_path(self._folder, task.cell, task.seed)
        if not path.exists():
            argument = msgspec.json.encode(jobs.CellJob(task, str(path)))
            ending = self._processes.run(jobs.compute_site_truth, argument, limit_s=self._limit_s)
            problem = jobs.truth_problem(ending, self._limit_s)
            if problem is not None:
                raise RoundError(*problem)
        return path


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
        cpus = _cpus(threads) if plan.device == "cpu" else []
        folder = stack.enter_context(scratch_folder())
        started = []
        for number, (name, paths) in enumerate(sides.items()):
            own = folder / f"side-{number}"
            own.mkdir()
            side = Side(
                name, paths, own, limit_s=limit_s, variables=variables, cpus=cpus, root=root
            )
            stack.callback(side.kill)
            started.append(side)
        for side in started:
            side.wait()
        tasks = plan.tasks(found)
        yield Testbed(found, started, tasks, _notes(started), processes, folder, limit_s)


def _notes(sides: Sequence[Side]) -> list[str]:
    if all(side.fixed_addresses for side in sides):
        return []
    return [
        "this system draws the addresses of each process's memory by lot, which alone can make "
        "them differ by some per cent: allow personality(2), or compare repeatedly"
    ]


def _cpus(threads: int) -> list[int]:
    """The CPUs that all sides compute on, one a thread; none where the system does not tell.

    Neighbours of a virtual machine slow its CPUs apart from each other: on the same ones the sides
    go through the same slow spells.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[-threads:]  # the first ones serve more interrupts
