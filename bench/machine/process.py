"""Runs a function in a process of its own, forked from a server that has imported everything.

The server is multiprocessing's. It has imported `preload` and never touched a device or the
allocator, so a process starts in milliseconds and yet clean: its memory peaks are its own, and
whatever ends it ends nothing else. What it prints goes through a pipe, of which the end is kept.
The reply comes back as bytes; nothing that such a process sends is unpickled.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import FrameType
from typing import Any

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.records import Status
from resblock_bench.bench.units import format_duration

from .parent import die_with_parent
from .proc import oom_kills

Announce = Callable[[str], None]
"""Tells the parent which phase begins."""
Function = Callable[[bytes, Announce], bytes]

OUTPUT_BYTES = 16 * 1024
"""How much of what a process prints is kept."""
_EXIT_S = 10.0  # A process that has replied may take this long to end.
_KILL_S = 30.0  # One that was killed may: held up in a driver it would take for ever.

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["resblock_bench.bench.measure.preload"])
# Multiprocessing looks after all children whenever it starts one, and not from several threads.
_bookkeeping = threading.Lock()


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    reply      what the function returned; None where it did not get so far
    exit_code  None where it was stopped by the time limit; -n for signal n
    phase      the last that it announced
    output     the end of what it printed
    wall_s     from the request to the end
    starved    whether the kernel killed it, or another one meanwhile, for want of memory
    """

    reply: bytes | None
    exit_code: int | None
    phase: str = ""
    output: str = ""
    wall_s: float = 0.0
    starved: bool = False

    def problem(self, limit_s: float = math.inf) -> tuple[Status, str]:
        """What became of a process without a reply: the status of a row, and a sentence."""
        where = f", in its phase {self.phase!r}" if self.phase else ""
        if self.exit_code is None:
            return "timeout", f"stopped after the time limit of {format_duration(limit_s)}{where}"
        if self.exit_code < 0:
            text = f"killed by {_signal_name(-self.exit_code)}{where}"
            if self.starved:
                return "oom", f"the system ran out of memory: {text}"
            return "crashed", text
        text = f"its process ended with code {self.exit_code}{where}"
        lines = self.output.strip().splitlines()
        return "crashed", f"{text}: {lines[-1]}" if lines else text


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


class ProcessesClosed(Exception):
    """Something was to be run after all processes were told to end."""


class Processes:
    """Starts processes one by one, from any number of threads, and can end them all."""

    def __init__(self) -> None:
        self._running: set[ForkServerProcess] = set()
        self._closed = False

    def run(
        self,
        function: Function,
        argument: bytes,
        *,
        limit_s: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ending:
        """Call `function(argument, announce)` in a new process and wait for its end.

        function      importable by name
        limit_s       seconds after which the process and all it started are killed
        environment   variables that are set before the function is called

        Raises InvalidError where this project cannot be imported.
        """
        started = time.monotonic()
        kills = oom_kills()
        replies, reply_end = _context.Pipe(duplex=False)
        output, output_end = _context.Pipe(duplex=False)
        with _bookkeeping:
            if self._closed:
                raise ProcessesClosed
            process = _context.Process(
                target=_serve,
                args=(function, argument, dict(environment or {}), reply_end, output_end),
                daemon=True,
            )
            try:
                forkserver.ensure_running()
                with _interrupts_later():
                    process.start()
                    self._running.add(process)
            except (EOFError, BrokenPipeError):
                raise InvalidError(
                    "no process can be started, since the suite cannot be imported: mend what is "
                    "said above"
                ) from None
        reply_end.close()
        output_end.close()
        os.set_blocking(output.fileno(), False)
        watch = _Watch(process, replies, output)
        ended = False
        try:
            ended = watch.until_end(started, limit_s)
        finally:
            _kill_group(process)
            if not ended:
                with _bookkeeping:
                    process.kill()
                wait([process.sentinel], _KILL_S)
            with _bookkeeping:
                process.join(0)
                exit_code = process.exitcode
                self._running.discard(process)
            watch.drain()
            replies.close()
            output.close()
        return Ending(
            reply=watch.reply,
            exit_code=exit_code if ended or watch.reply is not None else None,
            phase=watch.phase,
            output=watch.output.decode(errors="replace"),
            wall_s=time.monotonic() - started,
            starved=exit_code == -signal.SIGKILL and oom_kills() != kills,
        )

    def close(self) -> None:
        """End every running process; `run` refuses from now on."""
        with _bookkeeping:
            self._closed = True
            for process in self._running:
                _kill_group(process)
                process.kill()  # it may not lead a group yet


class _Watch:
    """What has come through the two pipes of a process so far."""

    def __init__(self, process: ForkServerProcess, replies: Connection, output: Connection) -> None:
        self._sentinel = process.sentinel
        self._replies = replies
        self._output = output
        self._open: list[Connection | int] = [replies, output, self._sentinel]
        self.reply: bytes | None = None
        self.phase = "start"
        self.output = b""

    def until_end(self, started: float, limit_s: float | None) -> bool:
        """Read until the process has ended; False if its time was over before."""
        deadline = None if limit_s is None else started + limit_s
        while self._sentinel in self._open:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            replied = self.reply is not None
            ready = wait(self._open, timeout)
            if not ready:
                return False
            if self._output in ready and not self._read_output():
                self._open.remove(self._output)
            if self._replies in ready and not self._read_reply():
                self._open.remove(self._replies)
            if self.reply is not None and not replied:
                deadline = time.monotonic() + _EXIT_S
            if self._sentinel in ready:
                self._open.remove(self._sentinel)
        return True

    def drain(self) -> None:
        """Read what an ended process has left in the pipes."""
        while self._output in self._open and self._read_output():
            pass
        while self._replies in self._open and self._replies.poll() and self._read_reply():
            pass

    def _read_output(self) -> bool:
        try:
            data = os.read(self._output.fileno(), 65536)
        except OSError:  # nothing there now
            return False
        self.output = (self.output + data)[-OUTPUT_BYTES:]
        return bool(data)

    def _read_reply(self) -> bool:
        try:
            message = self._replies.recv_bytes()
        except (EOFError, OSError):  # ended, perhaps in the middle of a message
            return False
        if message[:1] == b"P":
            self.phase = message[1:].decode()
        else:
            self.reply = message[1:]
        return True


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect after the block, a second one at once.

    A start that is left halfway makes the server, or the new process, print a traceback. Other
    threads than the main one are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {each: signal.signal(each, remember) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def _kill_group(process: ForkServerProcess) -> None:
    """The process and what it started, such as compilers."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _serve(
    function: Function,
    argument: bytes,
    environment: dict[str, str],
    replies: Connection,
    output: Connection,
) -> None:
    """The life of a process: its own group, its output in the pipe, one reply."""
    os.setsid()
    _let_server_end()
    die_with_parent()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(file=2)
    os.environ.update(environment)

    def announce(phase: str) -> None:
        replies.send_bytes(b"P" + phase.encode())

    reply = function(argument, announce)
    sys.stdout.flush()
    sys.stderr.flush()
    replies.send_bytes(b"R" + reply)


def _let_server_end() -> None:
    """The server ends when nobody holds the other end of its pipe.

    The suite does, and so would this process, which multiprocessing lets start further ones.
    """
    server: Any = getattr(forkserver, "_forkserver", None)
    alive = getattr(server, "_forkserver_alive_fd", None)
    if alive is not None:
        os.close(alive)
        server._forkserver_alive_fd = None
