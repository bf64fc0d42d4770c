"""Runs functions in processes of their own, forked from a server that has imported everything.

The server has never touched a device or the allocator, so a process starts in milliseconds and yet
clean: its memory peaks are its own, and whatever ends it ends nothing else. What it prints goes
through a pipe, of which the end is kept. A process may be given an argument and leave a reply, or
be talked with. See server.py for its end of all this.
"""

import atexit
import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

import msgspec

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.records import Status
from resblock_bench.bench.units import format_duration

from .channel import PHASE, REPLY, Function
from .parent import end_tree
from .proc import oom_kills, waited_for_cpu_s
from .server import COUNT, Request, Setup

OUTPUT_BYTES = 16 * 1024
"""How much of what a process prints is kept."""
_PRELOAD = "resblock_bench.bench.measure.preload"
# Before anything is imported, since the path decides what is.
_CODE = """
import json, sys
setup = json.loads(sys.argv[1])
sys.path[:] = [*setup["path"], *filter(None, sys.path)]
from resblock_bench.bench.machine.server import Setup, main
main(Setup(**setup))
"""
_START_S = 300.0
_EXIT_S = 10.0  # A process that has replied may take this long to end.
_KILL_S = 30.0  # One that was killed may: held up in a driver it would take for ever.
_ALIKE = {
    "PYTHONHASHSEED": "0",
    # Which buffers happen to get huge pages made processes of the same code differ by up to 11 %.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What would else be drawn by lot for each process."""
ADDR_NO_RANDOMIZE = 0x0040000  # sys/personality.h


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


class Server:
    """The interpreter that processes are forked from; it starts when the first one is asked for.

    paths   what its Python path begins with; None for this process's own path
    """

    def __init__(self, paths: Sequence[Path] | None = None) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def fork(self, request: Request) -> "_Ends":
        """A new process. Raises InvalidError where this project cannot be imported."""
        with self._lock:
            asked = self._running()
            channel, channel_theirs = socket.socketpair()
            output, output_theirs = os.pipe()
            state, state_theirs = os.pipe()
            theirs = [channel_theirs.fileno(), output_theirs, state_theirs]
            message = msgspec.json.encode(request)
            try:
                socket.send_fds(asked, [len(message).to_bytes(COUNT, "little")], theirs)
                asked.sendall(message)
            except OSError:  # it was killed, and the process will be found to have ended
                self._forget()
            channel_theirs.close()
            os.close(output_theirs)
            os.close(state_theirs)
        os.set_blocking(output, False)
        return _Ends(Connection(channel.detach()), output, state)

    def start(self) -> None:
        """Have it import everything now. Raises InvalidError where it cannot."""
        with self._lock:
            self._running()

    @property
    def up(self) -> bool:
        """Whether it runs: one that was killed is started anew, with the code of then."""
        if self._process is None or self._socket is None:
            return False
        # It says nothing once it is up: its end is seen here before the system tells of it.
        return not wait([self._socket], 0) and self._process.poll() is None

    def close(self) -> None:
        """End it, and with it all its processes."""
        with self._lock:
            self._forget()

    def _running(self) -> socket.socket:
        if not self.up:
            self._forget()
            self._start()
        assert self._socket is not None
        return self._socket

    def _start(self) -> None:
        own, other = socket.socketpair()
        if self._paths is None:
            path = [os.path.abspath(entry) for entry in sys.path]
            inherited = {}
        else:
            # What the code of a side starts imports from where the side does.
            before = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            path = [str(entry) for entry in [*self._paths, *map(os.path.abspath, before)]]
            inherited = {"PYTHONPATH": os.pathsep.join(path)}
        setup = Setup(other.fileno(), path, _PRELOAD)
        with tempfile.TemporaryFile() as log:
            with other, _fixed_addresses():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CODE, json.dumps(msgspec.to_builtins(setup))],
                    env={**os.environ, **_ALIKE, **inherited},
                    pass_fds=[other.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._socket = own
            own.settimeout(_START_S)
            try:
                up = own.recv(1)
            except TimeoutError:
                up = b""
            except BaseException:
                self._forget()
                raise
            own.settimeout(None)
            if not up:
                self._forget()
                log.seek(0)
                text = log.read().decode(errors="replace").strip()
                raise InvalidError(
                    "no process can be started, since the suite cannot be imported: mend what is "
                    f"said here\n{text}"
                )

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None


@dataclass(frozen=True)
class _Ends:
    """Of a new process: its channel, what it prints, and how it fares."""

    channel: Connection
    output: int
    state: int


_own = Server()
"""Of all that is run from the code of this process."""
atexit.register(_own.close)


class Process:
    """A process that was started. One thread at a time may talk with it, and `finish` must come."""

    def __init__(self, ends: _Ends, running: "set[Process]") -> None:
        self._channel, self._output, self._state = ends.channel, ends.output, ends.state
        self._open: list[Connection | int] = [self._channel, self._output, self._state]
        self._running = running
        self._messages: list[bytes] = []
        self._reply: bytes | None = None
        self._exit_code: int | None = None
        self._phase = "start"
        self._printed = b""
        self._started = time.monotonic()
        self._kills = oom_kills()
        self._pid = self._told()
        running.add(self)

    def send(self, message: bytes) -> None:
        """Whether it was heard is seen by what comes back."""
        with contextlib.suppress(OSError):
            self._channel.send_bytes(message)

    def receive(self, limit_s: float | None = None) -> bytes | None:
        """Its next message; None where none comes within the limit, or ever: `finish` tells."""
        self._watch(limit_s, lambda: bool(self._messages) or self._reply is not None)
        return self._messages.pop(0) if self._messages else None

    def held_up_s(self) -> float:
        """What its threads have waited for a CPU that others used, seconds since its start."""
        return 0.0 if self._pid is None else waited_for_cpu_s(self._pid)

    def finish(self, limit_s: float | None = None) -> Ending:
        """Wait for its end. After the limit it is killed; what it has started is in any case."""
        if self not in self._running:
            return self._ending(True)
        in_time = False
        try:
            self._watch(limit_s, lambda: self._reply is not None)
            if self._reply is not None:
                self._watch(_EXIT_S, lambda: False)
            in_time = self._reply is not None or self._ended
        finally:
            self.kill()
            self._watch(_KILL_S, lambda: False)
            self._drain()
            self._running.discard(self)
        return self._ending(in_time)

    def _ending(self, in_time: bool) -> Ending:
        starved = self._exit_code == -signal.SIGKILL and oom_kills() != self._kills
        return Ending(
            reply=self._reply,
            exit_code=self._exit_code if in_time else None,
            phase=self._phase,
            output=self._printed.decode(errors="replace"),
            wall_s=time.monotonic() - self._started,
            starved=starved,
        )

    def kill(self) -> None:
        """It and what it started, such as compilers; from any thread."""
        if self._pid is None or self not in self._running:
            return
        if not self._ended:
            end_tree(self._pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    @property
    def _ended(self) -> bool:
        return self._state not in self._open

    def _watch(self, limit_s: float | None, until: Callable[[], bool]) -> None:
        """Read what comes until it has ended, so much time has passed, or `until` holds."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while not self._ended and not until():
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait(self._open, timeout)
            if not ready:
                return
            if self._output in ready and not self._read_output():
                self._open.remove(self._output)
            if self._channel in ready and not self._read_message():
                self._open.remove(self._channel)
            if self._state in ready:
                self._open.remove(self._state)
                self._exit_code = self._told()
                if self._exit_code is None:  # the server has gone, and its processes go with it
                    self._exit_code = -signal.SIGKILL

    def _drain(self) -> None:
        """Read what it has left in the pipes, and close them."""
        while self._output in self._open and self._read_output():
            pass
        while self._channel in self._open and self._channel.poll() and self._read_message():
            pass
        self._channel.close()
        os.close(self._output)
        os.close(self._state)

    def _told(self) -> int | None:
        """What the server says next of this process."""
        number = os.read(self._state, COUNT)
        return int.from_bytes(number, "little", signed=True) if number else None

    def _read_output(self) -> bool:
        try:
            data = os.read(self._output, 65536)
        except OSError:  # nothing there now
            return False
        self._printed = (self._printed + data)[-OUTPUT_BYTES:]
        return bool(data)

    def _read_message(self) -> bool:
        try:
            message = self._channel.recv_bytes()
        except (EOFError, OSError):  # ended, perhaps in the middle of a message
            return False
        if message[:1] == PHASE:
            self._phase = message[1:].decode(errors="replace")
        elif message[:1] == REPLY:
            self._reply = message[1:]
        else:
            self._messages.append(message[1:])
        return True


class Processes:
    """Starts processes one by one, from any number of threads, and can end them all.

    server   what they are forked from; None is the one of this process's own code
    """

    def __init__(self, server: Server | None = None) -> None:
        self._server = server or _own
        self._running: set[Process] = set()
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self,
        function: Function,
        argument: bytes,
        *,
        limit_s: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ending:
        """`start` a process and wait for its end; after the limit it is killed."""
        return self.start(function, argument, environment=environment).finish(limit_s)

    def start(
        self,
        function: Function,
        argument: bytes,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Call `function(argument, channel)` in a new process.

        function      importable by name
        environment   variables that are set before the function is imported

        Raises InvalidError where this project cannot be imported.
        """
        name = f"{function.__module__}:{function.__qualname__}"
        request = Request(name, dict(environment or {}))
        self._server.start()
        with self._lock, _interrupts_later():
            if self._closed:
                raise ProcessesClosed
            process = Process(self._server.fork(request), self._running)
        process.send(argument)
        return process

    def close(self) -> None:
        """End every running process; `run` and `start` refuse from now on."""
        with self._lock:
            self._closed = True
            for process in list(self._running):
                process.kill()


@contextlib.contextmanager
def _fixed_addresses() -> Iterator[None]:
    """Where the system allows it, what this thread starts has the same addresses as all others of
    its kind, not a draw for each."""
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = libc.personality(0xFFFFFFFF)
    libc.personality(before | ADDR_NO_RANDOMIZE)
    try:
        yield
    finally:
        libc.personality(before)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect after the block, a second one at once: of a start that is left
    halfway nobody would know the process.

    Other threads than the main one are never interrupted.
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
