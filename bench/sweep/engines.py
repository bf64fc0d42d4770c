"""Engines carry tasks out: an engine takes cells and yields rows.

local   a lane for each visible GPU, or one on the CPU
ray     the same on the nodes of a Ray cluster (ray_engine.py)

A lane measures one cell after the other on one device, each in a process of its own.
"""

import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.proc import available_bytes
from resblock_bench.bench.machine.process import Ending, Processes, ProcessesClosed
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import Task, reason_of, row_of
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.measure.truth_file import truth_path
from resblock_bench.bench.records import Environment, Row, Status


class Engine(Protocol):
    """Measures up to `lanes` tasks at a time, on machines like the one that `survey` finds.

    `close` ends what still runs; its rows are lost. `survey` raises UsageError where the device
    cannot be used.
    """

    @property
    def lanes(self) -> int: ...

    def survey(self) -> Environment: ...

    def submit(self, task: Task) -> Future[Row]: ...

    def close(self) -> None: ...


class Lane:
    """Turns tasks into rows.

    folder      its own, where the truth of the newest site is kept for all its variants
    limit_s     seconds that a cell may take, and again the truth of its site
    gpu         the UUID of the GPU that is this lane's own; None on a CPU
    """

    def __init__(
        self, processes: Processes, folder: Path, *, limit_s: float, gpu: str | None = None
    ) -> None:
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self._run = partial(processes.run, limit_s=limit_s, environment=environment)
        self._folder = folder
        self._limit_s = limit_s
        # As PyTorch writes it; a position, by which Ray names a GPU, says nothing here.
        self._uuid = gpu.removeprefix("GPU-") if gpu and gpu.startswith(("GPU-", "MIG-")) else None
        self._truth: Path | None = None

    def measure(self, task: Task) -> Row:
        """The row of a task, whatever becomes of its process."""
        if task.device == "cpu" and task.memory_limit_bytes is None:
            # What this machine has to give: without a limit its out-of-memory killer decides.
            task = replace(task, memory_limit_bytes=available_bytes())
        if self._uuid is not None:
            task = replace(task, environment=replace(task.environment, gpu_uuid=self._uuid))
        truth = truth_path(self._folder, task.cell, task.seed)
        argument = msgspec.json.encode(jobs.CellJob(task, str(truth)))
        try:
            if truth != self._truth:
                if self._truth is not None:  # one may take gigabytes
                    self._truth.unlink(missing_ok=True)
                    self._truth = None
                ending = self._run(jobs.compute_site_truth, argument)
                problem = jobs.truth_problem(ending, self._limit_s)
                if problem is not None:
                    return _row_without_timing(task, *problem, ending)
                self._truth = truth
            ending = self._run(jobs.measure_cell, argument)
            if ending.reply is None:
                return _row_without_timing(task, *ending.problem(self._limit_s), ending)
            row = msgspec.json.decode(ending.reply, type=Row)
            overhead_s = max(0.0, ending.wall_s - (row.wall_s or 0.0))
            output = None if row.status == "ok" else ending.output or None
            return replace(row, wall_s=ending.wall_s, overhead_s=overhead_s, output=output)
        except ProcessesClosed:
            raise
        except Exception as error:  # no reply is worth the end of a sweep
            return row_of(task, "failed", f"its process could not be used: {reason_of(error)}")


def _row_without_timing(task: Task, status: Status, reason: str, ending: Ending) -> Row:
    return row_of(task, status, reason, output=ending.output or None, wall_s=ending.wall_s)


class LocalEngine:
    """This machine. Two cells never share a GPU, also not with another run of this suite.

    kind        "cuda" has a lane for each GPU, "cpu" one
    threads     of a cell
    limit_s     the time limit of a cell, seconds
    devices     the GPUs to use, by position or UUID; empty for all that are visible

    Raises UsageError for a GPU that is not there or that another run uses.
    """

    def __init__(
        self, kind: Kind, *, threads: int, limit_s: float, devices: Sequence[str] = ()
    ) -> None:
        gpus = [gpu.uuid for gpu in chosen_gpus(devices)] if kind == "cuda" else []
        self._survey = SurveyJob(kind, threads)
        self._variables = {"CUDA_VISIBLE_DEVICES": gpus[0]} if gpus else None
        self._open = ExitStack()
        self._processes = Processes()
        self._open.callback(self._processes.close)
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self.lanes = max(1, len(gpus))
        try:
            for gpu in gpus:
                self._open.enter_context(only_user(gpu))
            each: Sequence[str | None] = gpus or (None,)
            for own in each:
                folder = self._open.enter_context(scratch_folder())
                self._lanes.put(Lane(self._processes, folder, limit_s=limit_s, gpu=own))
        except BaseException:
            self._open.close()
            raise
        self._pool = ThreadPoolExecutor(self.lanes, thread_name_prefix="lane")
        self._open.callback(self._pool.shutdown, wait=True, cancel_futures=True)
        # Last in, first out: the processes must end before their lanes can.
        self._open.callback(self._processes.close)

    def survey(self) -> Environment:
        """This machine. Raises UsageError where its device cannot be used."""
        return survey(self._processes, self._survey, self._variables)

    def submit(self, task: Task) -> Future[Row]:
        """Waits while no lane is free."""
        lane = self._lanes.get()
        future = self._pool.submit(lane.measure, task)
        future.add_done_callback(lambda _: self._lanes.put(lane))
        return future

    def close(self) -> None:
        self._open.close()
