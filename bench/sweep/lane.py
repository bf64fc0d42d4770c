"""A lane measures one cell after the other on one device, each in a process of its own."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.machine.process import Ending, Processes, ProcessesClosed
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import Task, reason_of, row_of
from resblock_bench.bench.measure.memory_limit import available_bytes, oom_kills
from resblock_bench.bench.measure.truth_file import truth_path
from resblock_bench.bench.records import Row, Status
from resblock_bench.bench.units import format_duration


class Lane:
    """Turns tasks into rows.

    folder      its own, where the truth of the newest site is kept for all its variants
    limit_s     seconds that a cell may take, and again the truth of its site
    gpu         the UUID of the GPU that is this lane's own; None on a CPU
    """

    def __init__(
        self, processes: Processes, folder: Path, *, limit_s: float, gpu: str | None = None
    ) -> None:
        self._processes = processes
        self._folder = folder
        self._limit_s = limit_s
        self._environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
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
        try:
            return self._measure(task)
        except ProcessesClosed:
            raise
        except Exception as error:  # no reply is worth the end of a sweep
            return row_of(task, "failed", f"its process could not be used: {reason_of(error)}")

    def _measure(self, task: Task) -> Row:
        truth = truth_path(self._folder, task.cell, task.seed)
        argument = msgspec.json.encode(jobs.CellJob(task, str(truth)))
        if truth != self._truth:
            self._forget()
            ending, status = self._run(jobs.compute_site_truth, argument)
            if ending.reply is None:
                return self._without_reply(
                    task, ending, status, "while its float64 truth was computed"
                )
            reply = msgspec.json.decode(ending.reply, type=jobs.TruthReply)
            if reply.status != "ok":
                return row_of(
                    task,
                    reply.status,
                    f"its float64 truth: {reply.reason}",
                    output=ending.output or None,
                    wall_s=ending.wall_s,
                )
            self._truth = truth
        ending, status = self._run(jobs.measure_cell, argument)
        if ending.reply is None:
            return self._without_reply(task, ending, status, f"in its phase {ending.phase!r}")
        row = msgspec.json.decode(ending.reply, type=Row)
        overhead_s = max(0.0, ending.wall_s - (row.wall_s or 0.0))
        output = None if row.status == "ok" else ending.output or None
        return replace(row, wall_s=ending.wall_s, overhead_s=overhead_s, output=output)

    def _run(self, function: Any, argument: bytes) -> tuple[Ending, Status]:
        """How a process ended, and what it means if there is no reply."""
        kills = oom_kills()
        ending = self._processes.run(
            function, argument, limit_s=self._limit_s, environment=self._environment
        )
        if ending.exit_code is None:
            return ending, "timeout"
        # A kill that came from the system's out-of-memory killer, which counts them.
        killed = ending.exit_code == -signal.SIGKILL and oom_kills() != kills
        return ending, "oom" if killed else "crashed"

    def _forget(self) -> None:
        """The truth of the last site: one may take gigabytes."""
        if self._truth is not None:
            self._truth.unlink(missing_ok=True)
            self._truth = None

    def _without_reply(self, task: Task, ending: Ending, status: Status, when: str) -> Row:
        if ending.exit_code is None:
            reason = f"stopped after the time limit of {format_duration(self._limit_s)}, {when}"
        elif ending.exit_code < 0:
            cause = "the system ran out of memory: " if status == "oom" else ""
            reason = f"{cause}killed by {_signal_name(-ending.exit_code)}, {when}"
        else:
            reason = f"its process ended with code {ending.exit_code}, {when}"
            lines = ending.output.strip().splitlines()
            reason += f": {lines[-1]}" if lines else ""
        return row_of(task, status, reason, output=ending.output or None, wall_s=ending.wall_s)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
