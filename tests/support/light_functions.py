"""What tests of processes run in them, with nothing imported that a process had to wait for."""

import os
import signal
import time
from pathlib import Path

from resblock_bench.bench.machine.channel import Channel


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
