"""The two sides of a comparison as seen by what compares them: started, given orders, ended."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TypeVar

import msgspec

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.machine.process import Ending
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.records import Status

from . import orders

_SERVER = "resblock_bench.bench.lockstep.side"
_START_S = 300.0
_EXIT_S = 10.0  # A side that has closed its end of the socket is ending.
_ALIKE = {
    "PYTHONHASHSEED": "0",
    # Which buffers happen to get huge pages made sides of the same code differ by up to 11 %.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What would else be drawn by lot for each side, and stay for all its rounds."""
A = TypeVar("A", orders.Opened, orders.Samples, orders.Counters, orders.Ended, orders.Up)


def _fix_addresses() -> None:
    """Where the system allows it: the same addresses on all sides, not a draw for each."""
    libc = ctypes.CDLL(None)
    libc.personality(libc.personality(0xFFFFFFFF) | orders.ADDR_NO_RANDOMIZE)


class SideError(Exception):
    """A round came to nothing on one side; `status` is that of a row."""

    def __init__(self, side: "Side", status: Status, reason: str) -> None:
        super().__init__(reason)
        self.side = side
        self.status: Status = status


class Side:
    """One side: an interpreter that imports the code of that side, and forks a process a round.

    It starts at once; `wait` until it is up before the first round.

    name        how people call it: a revision, or "the working tree"
    paths       what its Python path begins with
    folder      an empty one, for what it prints
    root        of another repository, whose modules outside of the paths are refused
    limit_s     seconds that an order may take
    variables   of its environment, beside those of this process
    cpus        that rounds compute on; none are those of this process

    The code that is measured has to lie in one of the paths, if there are any.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        folder: Path,
        *,
        limit_s: float,
        variables: Mapping[str, str] | None = None,
        cpus: Collection[int] = (),
        root: Path | None = None,
    ) -> None:
        self.name = name
        self._paths = [str(path) for path in paths]
        self._limit_s = limit_s
        self._variables = dict(variables or {})
        self._cpus = cpus
        self._root = "" if root is None else str(root)
        self._folder = folder
        self._log = folder / "output"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: Connection | None = None
        self._measuring = False
        self._began = time.time()
        self.code = ""
        self.fixed_addresses = False
        self._start()

    def wait(self) -> None:
        """Until it has imported everything. Raises InvalidError where it cannot."""
        up = self._up()
        self.code, self.fixed_addresses = up.code, up.fixed_addresses

    def _start(self) -> None:
        own, other = Pipe(duplex=True)
        # Absolute, since the process starts in another folder.
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        cpus = ",".join(map(str, self._cpus))
        path = os.pathsep.join([*self._paths, *map(os.path.abspath, inherited)])
        with other, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", _SERVER, str(other.fileno())),
                    *(cpus, repr(self._began), self._root, *self._paths),
                ],
                env={**os.environ, **_ALIKE, **self._variables, "PYTHONPATH": path},
                pass_fds=[other.fileno()],
                # With -m a package in the current folder would come before the path.
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_fix_addresses if sys.platform == "linux" else None,
            )
        self._socket = own

    def _up(self) -> orders.Up:
        try:
            return self._answer(orders.Up, _START_S)
        except SideError as error:
            raise InvalidError(
                f"{self.name} cannot be imported, so there is nothing to compare: {error}"
            ) from None

    def open(self, task: Task, truth: Path) -> None:
        """Begin a round: a fresh process with a checked, warm cell. Raises SideError."""
        if self._process is None:
            self._restart()
        # What an earlier round printed says nothing of this one.
        os.truncate(self._log, 0)
        self._measuring = True
        opened = self._ask(orders.Open(task, str(truth)), orders.Opened)
        if opened.status != "ok":
            self._answer(orders.Ended, self._limit_s)
            raise SideError(self, opened.status, opened.reason or "no reason was given")

    def _restart(self) -> None:
        self._start()
        try:
            up = self._up()
        except InvalidError as error:
            raise SideError(self, "crashed", str(error)) from None
        if up.code != self.code:
            self.kill()
            raise SideError(self, "crashed", "its files changed meanwhile: compare again")

    def burst(self, seconds: float) -> list[float]:
        """Samples in milliseconds."""
        return self._ask(orders.Burst(seconds), orders.Samples).samples_ms

    def read(self) -> orders.Counters:
        """The machine's counters, as the round's process sees them."""
        return self._ask(orders.Read(), orders.Counters)

    def end(self) -> None:
        """End the round's process."""
        ended = self._ask(orders.Close(), orders.Ended)
        if ended.exit_code:
            raise self._failed(ended.exit_code)

    def abandon(self) -> None:
        """End the round's process where there is one, whatever it answers."""
        if self._measuring:
            with contextlib.suppress(SideError):
                self.end()

    def kill(self, grace_s: float = 0.0) -> int | None:
        """End whatever runs; the next round starts anew. Returns the exit code.

        grace_s   seconds in which it may end by itself
        """
        self._measuring = False
        exit_code = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            exit_code = self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        return exit_code

    def _ask(self, order: orders.Order, expected: type[A]) -> A:
        assert self._socket is not None
        with contextlib.suppress(OSError):  # it has ended: what it said last is there to read
            self._socket.send_bytes(msgspec.json.encode(order))
        return self._answer(expected, self._limit_s)

    def _answer(self, expected: type[A], limit_s: float) -> A:
        assert self._socket is not None
        try:
            if not self._socket.poll(limit_s):
                self.kill()
                raise self._failed(None, limit_s)
            answer = msgspec.json.decode(self._socket.recv_bytes(), type=orders.Reply)
        except (EOFError, OSError, msgspec.DecodeError):
            raise self._failed(self.kill(_EXIT_S)) from None
        if isinstance(answer, orders.Ended):
            self._measuring = False
        if isinstance(answer, orders.Ended) and not isinstance(answer, expected):
            raise self._failed(answer.exit_code)
        assert isinstance(answer, expected), answer
        return answer

    def _failed(self, exit_code: int | None, limit_s: float = 0.0) -> SideError:
        output = self._log.read_text(errors="replace")
        return SideError(self, *Ending(None, exit_code, output=output).problem(limit_s))
