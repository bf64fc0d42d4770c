"""What tests run in processes of their own."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from resblock_bench.bench.gate import memory as check_memory
from resblock_bench.bench.gate.accuracy_cases import AccuracyCase, Errors
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.records import Cell, Memory
from resblock_bench.kernels import blocks
from resblock_bench.kernels.dispatch import Backend


def echo(argument: bytes, channel: Channel) -> bytes:
    channel.announce("echoing")
    return argument + str(os.getpid()).encode()


def converse(argument: bytes, channel: Channel) -> bytes:
    """Every message comes back in capitals, until the end."""
    channel.announce("conversing")
    heard = 0
    while argument != b"end":
        channel.send(argument.upper())
        heard, argument = heard + 1, channel.receive()
    return f"{heard} heard".encode()


def tell_group(argument: bytes, channel: Channel) -> bytes:
    """Write the number of the own group, say so, and wait."""
    Path(argument.decode()).write_text(str(os.getpgid(0)))
    channel.send(b"written")
    return channel.receive()


def parent(argument: bytes, channel: Channel) -> bytes:
    """The number of the server that the process was forked from."""
    return str(os.getppid()).encode()


def environment(argument: bytes, channel: Channel) -> bytes:
    return os.environ.get(argument.decode(), "absent").encode()


def state(argument: bytes, channel: Channel) -> bytes:
    """Whether the process began warm and clean."""
    threads = Path("/proc/self/status").read_text().split("Threads:")[1].split()[0]
    warm = "resblock_bench.bench.measure.cell" in sys.modules
    return f"{warm} {torch.cuda.is_initialized()} {threads}".encode()


def hang(argument: bytes, channel: Channel) -> bytes:
    channel.announce("hanging")
    print("I hang", flush=True)
    if os.fork() == 0:  # and so does what it started
        time.sleep(1000)
    Path(argument.decode()).write_text(str(os.getpgid(0)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
    return b""


def print_much(argument: bytes, channel: Channel) -> bytes:
    print("x" * 1_000_000 + " the end", flush=True)
    return b"done"


def fail(argument: bytes, channel: Channel) -> bytes:
    channel.announce("failing")
    raise ValueError("no good")


def end_by_signal(argument: bytes, channel: Channel) -> bytes:
    os.kill(os.getpid(), int(argument))
    return b""


def large_reply(argument: bytes, channel: Channel) -> bytes:
    return b"r" * int(argument)


def die(argument: object) -> None:
    os._exit(1)


def leave() -> None:
    """As a package does that looks for a GPU when it is imported."""
    raise SystemExit(0)


def predict_or_crash(cell: Cell, backend: Backend) -> Memory | None:
    """The memory of a cell, unless all of it is recomputed."""
    if cell.checkpoint == "full":
        raise RuntimeError("boom")
    return check_memory.predict(cell, backend)


def predict_one_more(cell: Cell, backend: Backend) -> Memory | None:
    """The memory of a block that saves another activation: square keeps what it is given."""
    operator = blocks.group_norm_silu
    blocks.group_norm_silu = lambda *a, **k: operator(*a, **k).square()
    try:
        return check_memory.predict(cell, backend)
    finally:
        blocks.group_norm_silu = operator


def measure_naively(case: AccuracyCase) -> Errors:
    """The errors of kernels that lose digits; imported where they are interpreted."""
    from . import naive_kernels

    return naive_kernels.measure(case)


def host_time() -> Any:
    """A HostTime of few rounds."""
    from resblock_bench.bench.cost import host_time

    host_time.ROUNDS = host_time.WARMUP = 2
    return host_time.measure_host_time("bf16")
