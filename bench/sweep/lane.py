"""A lane measures one cell after the other on one device, each in a process of its own."""

from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.machine.proc import available_bytes
from resblock_bench.bench.machine.process import Ending, Processes, ProcessesClosed
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import Task, reason_of, row_of
from resblock_bench.bench.measure.truth_file import truth_path
from resblock_bench.bench.records import Row, Status


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
                self._forget()
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

    def _forget(self) -> None:
        """The truth of the last site: one may take gigabytes."""
        if self._truth is not None:
            self._truth.unlink(missing_ok=True)
            self._truth = None


def _row_without_timing(task: Task, status: Status, reason: str, ending: Ending) -> Row:
    return row_of(task, status, reason, output=ending.output or None, wall_s=ending.wall_s)
