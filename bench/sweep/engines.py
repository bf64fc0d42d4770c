"""Engines carry blocks out: an engine takes a block's tasks, one a variant, and returns their rows.

local   a lane for each visible GPU, or one on the CPU
ray     the same on the nodes of a Ray cluster (ray_engine.py)

A lane measures one block after the other on one device.
"""

import queue
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.lockstep.block import measure_block
from resblock_bench.bench.lockstep.party import Party
from resblock_bench.bench.machine.channel import Function
from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.proc import available_bytes, last_cpus
from resblock_bench.bench.machine.process import Ending, Processes, ProcessesClosed
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.machine.visible_gpus import chosen_gpus
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import CellJob, Task, reason_of, row_of
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.measure.truth_file import truths_folder
from resblock_bench.bench.records import Ceilings, Environment, Row

Block = Sequence[Task]
"""The variants of a block that are to be measured together."""


class Engine(Protocol):
    """Measures up to `lanes` blocks at a time, on machines like the one that `survey` finds.

    `close` ends what still runs; its rows are lost. `survey` raises UsageError where the device
    cannot be used.
    """

    @property
    def lanes(self) -> int: ...

    def survey(self) -> Environment: ...

    def submit(self, block: Block) -> Future[list[Row]]: ...

    def close(self) -> None: ...


class Lane:
    """Turns blocks into rows.

    folder      its own, where the truths of a site are kept for all its variants
    limit_s     seconds that a cell may take, and again the truths of its site
    gpu         the UUID of the GPU that is this lane's own; None on a CPU
    cpus        that its processes compute on; none are any
    """

    def __init__(
        self,
        processes: Processes,
        folder: Path,
        *,
        limit_s: float,
        gpu: str | None = None,
        cpus: Sequence[int] = (),
    ) -> None:
        self._processes, self._folder, self._limit_s = processes, folder, limit_s
        self._variables = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        # As PyTorch writes it; a position, by which Ray names a GPU, says nothing here.
        self._uuid = gpu.removeprefix("GPU-") if gpu and gpu.startswith(("GPU-", "MIG-")) else None
        self._cpus = list(cpus)

    def measure(self, block: Block) -> list[Row]:
        """The rows of a block, whatever becomes of its processes."""
        first = block[0]
        truths = truths_folder(self._folder, first.cell, first.seed)
        try:
            job = msgspec.json.encode(CellJob(task=first, truths=str(truths)))
            ending = self._run(jobs.compute_site_truths, job)
            problem = jobs.truth_problem(ending, self._limit_s)
            if problem is not None:
                output, wall_s = ending.output or None, ending.wall_s
                return [row_of(task, *problem, output=output, wall_s=wall_s) for task in block]
            return measure_block(block, partial(self._begin, truths), self._ceilings)
        except ProcessesClosed:
            raise
        except Exception as error:  # no reply is worth the end of a sweep
            reason = f"its process could not be used: {reason_of(error)}"
            return [row_of(task, "failed", reason) for task in block]
        finally:
            shutil.rmtree(truths, ignore_errors=True)  # they may take gigabytes

    def _begin(self, truths: Path, task: Task) -> Party:
        if task.device == "cpu" and task.memory_limit_bytes is None:
            # What this machine has to give: without a limit its out-of-memory killer decides.
            task = replace(task, memory_limit_bytes=available_bytes())
        if self._uuid is not None:
            task = replace(task, environment=replace(task.environment, gpu_uuid=self._uuid))
        job = CellJob(task=task, truths=str(truths), cpus=self._cpus)
        return Party(self._processes, job, limit_s=self._limit_s, environment=self._variables)

    def _ceilings(self, task: Task) -> Ceilings | None:
        """Those of the machine, measured now; None where that fails."""
        job = SurveyJob(task.device, task.environment.threads)
        try:
            return survey(self._processes, job, self._variables).ceilings
        except UsageError:
            return None

    def _run(self, function: Function, argument: bytes) -> Ending:
        return self._processes.run(
            function, argument, limit_s=self._limit_s, environment=self._variables
        )


class LocalEngine:
    """This machine. Two blocks never share a GPU, also not with another run of this suite.

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
                cpus = last_cpus(threads) if own is None else ()
                self._lanes.put(Lane(self._processes, folder, limit_s=limit_s, gpu=own, cpus=cpus))
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

    def submit(self, block: Block) -> Future[list[Row]]:
        """Waits while no lane is free."""
        lane = self._lanes.get()
        future = self._pool.submit(lane.measure, block)
        future.add_done_callback(lambda _: self._lanes.put(lane))
        return future

    def close(self) -> None:
        self._open.close()
