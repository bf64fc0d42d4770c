"""What the processes of a sweep are asked to do; JSON in, JSON out."""

from pathlib import Path

import msgspec

from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.machine.proc import available_bytes, personality
from resblock_bench.bench.machine.process import ADDR_NO_RANDOMIZE, Ending
from resblock_bench.bench.records import Status, site_of

from .cell import CellJob, measure, reason_of, status_of
from .correctness import LAST_INPUTS, compute_truth
from .devices import open_device
from .fingerprint import code_fingerprint
from .memory_limit import limit_memory
from .truth_file import FIRST, LAST, write_truth
from .workload import checked_cell


def measure_cell(argument: bytes, channel: Channel) -> bytes:
    """CellJob -> Row, in turns with other cells; see orders.py."""
    return msgspec.json.encode(measure(msgspec.json.decode(argument, type=CellJob), channel))


class Code(msgspec.Struct):
    """What a process is forked from.

    code              the digest of the code that it has imported
    fixed_addresses   whether its memory lies where that of other processes does
    """

    code: str
    fixed_addresses: bool


def tell_code(argument: bytes, channel: Channel) -> bytes:
    """-> Code."""
    fixed = bool(personality() & ADDR_NO_RANDOMIZE)
    return msgspec.json.encode(Code(code_fingerprint(), fixed))


class TruthReply(msgspec.Struct):
    """Whether the truths were written; status and reason are those of a row where it was not."""

    status: Status
    reason: str | None = None


def compute_site_truths(argument: bytes, channel: Channel) -> bytes:
    """CellJob -> TruthReply."""
    channel.announce("truth")
    job = msgspec.json.decode(argument, type=CellJob)
    task, folder = job.task, Path(job.truths)
    reply = TruthReply("ok")
    try:
        device = open_device(task.device, task.environment.threads)
        free = available_bytes() if task.device == "cpu" else None
        if free is not None:
            limit_memory(free)
        site = checked_cell(site_of(task.cell))
        folder.mkdir(exist_ok=True)
        for name, seed in ((FIRST, task.seed), (LAST, task.seed + LAST_INPUTS)):
            truth = compute_truth(site, device.torch_device, task.seed, seed)
            write_truth(folder / name, truth)
            del truth
    except Exception as error:
        reply = TruthReply(status_of(error), reason_of(error))
    return msgspec.json.encode(reply)


def truth_problem(ending: Ending, limit_s: float) -> tuple[Status, str] | None:
    """Status and reason of a row whose truth was not written by `compute_site_truths`, or None."""
    if ending.reply is None:
        status, reason = ending.problem(limit_s)
        return status, f"its float64 truth: {reason}"
    reply = msgspec.json.decode(ending.reply, type=TruthReply)
    return None if reply.status == "ok" else (reply.status, f"its float64 truth: {reply.reason}")
