"""What tests run in processes of their own."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Announce = Callable[[str], None]


def echo(argument: bytes, announce: Announce) -> bytes:
    announce("echoing")
    return argument + str(os.getpid()).encode()


def environment(argument: bytes, announce: Announce) -> bytes:
    return os.environ.get(argument.decode(), "absent").encode()


def state(argument: bytes, announce: Announce) -> bytes:
    """Whether the process began warm and clean."""
    threads = Path("/proc/self/status").read_text().split("Threads:")[1].split()[0]
    warm = "resblock_bench.bench.measure" in sys.modules
    return f"{warm} {torch.cuda.is_initialized()} {threads}".encode()


def hang(argument: bytes, announce: Announce) -> bytes:
    announce("hanging")
    print("I hang", flush=True)
    if os.fork() == 0:  # and so does what it started
        time.sleep(1000)
    Path(argument.decode()).write_text(str(os.getpgid(0)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
    return b""


def print_much(argument: bytes, announce: Announce) -> bytes:
    print("x" * 1_000_000 + " the end", flush=True)
    return b"done"


def fail(argument: bytes, announce: Announce) -> bytes:
    announce("failing")
    raise ValueError("no good")


def end_by_signal(argument: bytes, announce: Announce) -> bytes:
    os.kill(os.getpid(), int(argument))
    return b""


def large_reply(argument: bytes, announce: Announce) -> bytes:
    return b"r" * int(argument)


def die(argument: object) -> None:
    os._exit(1)
