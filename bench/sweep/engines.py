"""Engines carry tasks out: an engine takes cells and yields rows.

local   a lane for each visible GPU, or one on the CPU, each cell in a process of its own
ray     the same on the nodes of a Ray cluster (ray_engine.py)
"""

import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

from msgspec.structs import replace

from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.records import Environment, Row

from .lane import Lane


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
        found = survey(self._processes, self._survey, self._variables)
        return replace(found, machine=machine_name())

    def submit(self, task: Task) -> Future[Row]:
        return self._pool.submit(self._measure, task)

    def _measure(self, task: Task) -> Row:
        lane = self._lanes.get()
        try:
            return lane.measure(task)
        finally:
            self._lanes.put(lane)

    def close(self) -> None:
        self._open.close()
