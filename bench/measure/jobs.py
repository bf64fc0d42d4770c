"""What the processes of a sweep are asked to do; JSON in, JSON out."""

from pathlib import Path

import msgspec

from resblock_bench.bench.machine.proc import available_bytes
from resblock_bench.bench.machine.process import Announce, Ending
from resblock_bench.bench.records import Status, site_of

from .cell import Task, measure, reason_of, status_of
from .correctness import checked_cell, compute_truth
from .devices import open_device
from .memory_limit import limit_memory
from .truth_file import write_truth


class CellJob(msgspec.Struct):
    """Measure a task, or write the truth of its site; `truth` is the file."""

    task: Task
    truth: str


def measure_cell(argument: bytes, announce: Announce) -> bytes:
    """CellJob -> Row."""
    job = msgspec.json.decode(argument, type=CellJob)
    return msgspec.json.encode(measure(job.task, Path(job.truth), announce))


class TruthReply(msgspec.Struct):
    """Whether the truth was written; status and reason are those of a row where it was not."""

    status: Status
    reason: str | None = None


def compute_site_truth(argument: bytes, announce: Announce) -> bytes:
    """CellJob -> TruthReply."""
    announce("truth")
    job = msgspec.json.decode(argument, type=CellJob)
    task = job.task
    reply = TruthReply("ok")
    try:
        device = open_device(task.device, task.environment.threads)
        free = available_bytes() if task.device == "cpu" else None
        if free is not None:
            limit_memory(free)
        truth = compute_truth(checked_cell(site_of(task.cell)), device.torch_device, task.seed)
        write_truth(Path(job.truth), truth)
    except Exception as error:
        reply = TruthReply(status_of(error), reason_of(error))
    return msgspec.json.encode(reply)


def truth_problem(ending: Ending, limit_s: float) -> tuple[Status, str] | None:
    """Status and reason of a row whose truth was not written by `compute_site_truth`, or None."""
    if ending.reply is None:
        status, reason = ending.problem(limit_s)
        return status, f"its float64 truth: {reason}"
    reply = msgspec.json.decode(ending.reply, type=TruthReply)
    return None if reply.status == "ok" else (reply.status, f"its float64 truth: {reply.reason}")
