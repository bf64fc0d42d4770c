"""Worker processes in which Triton's kernels are interpreted, or compiled: never both in one.

Imports no kernel: a worker imports this module before it knows which it is to be, and a kernel is
one or the other from the moment it is defined.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from resblock_bench.bench.errors import InvalidError

from .parent import die_with_parent
from .process import Ending

JOB_LIMIT_S = 300.0
"""Nothing that is asked of a worker takes a tenth of this; a kernel that waits for itself would
take for ever."""

_END_S = 30.0  # One that has closed its end of the pipe is ending, which on a busy machine takes.


class JobFailed(InvalidError):
    """A job raised an error: its type and what it says. Not every error can be sent as it is."""


class MachineFailed(JobFailed):
    """What it raised is the operating system's: a cache that cannot be written, a full disk. Other
    jobs run into it as well."""


class WorkerDied(JobFailed):
    """A worker process ended before it answered."""


class Job(NamedTuple):
    """`function(*arguments)`, where kernels are interpreted or else compiled.

    The function is importable by name; arguments and value can be pickled, and the arguments
    hashed.
    """

    interpret: bool
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Answer(NamedTuple):
    """What a job came to: its value, or why it has none."""

    value: Any
    error: JobFailed | None

    def get(self) -> Any:
        """The value; raises JobFailed where there is none."""
        if self.error is not None:
            raise self.error
        return self.value


def _died(exit_code: int | None, limit_s: float = _END_S) -> Answer:
    return Answer(None, WorkerDied(Ending(None, exit_code).problem(limit_s)[1]))


class Worker:
    """A fresh process with TRITON_INTERPRET set or unset, whatever it is in this one.

    It does one job at a time. `connection` is readable once there is an answer.

    environ     further variables, for libraries that read them when they are imported
    """

    def __init__(self, *, interpret: bool, environ: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.interpret = interpret
        variables = {**(environ or {}), "TRITON_INTERPRET": "1" if interpret else "0"}
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, variables), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        """Send a job without waiting. The answer says if the process has died meanwhile."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send((job.function, job.arguments))

    def answer(self) -> Answer:
        """Wait for the answer to the job that was sent; WorkerDied is one."""
        try:
            value, error, of_machine = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_END_S)
            return _died(self._process.exitcode)
        failed = MachineFailed if of_machine else JobFailed
        return Answer(value, None if error is None else failed(error))

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def run(
    jobs: Iterable[Job],
    workers: int,
    environ: Mapping[str, str] | None = None,
    limit_s: float = JOB_LIMIT_S,
) -> Generator[tuple[Job, Answer], None, None]:
    """The answer to each of the jobs, once each, as they come; so many at a time.

    A job whose process dies, or that takes longer than `limit_s`, fails alone: no process has two.
    Half of the processes start with interpreting, and whoever has nothing left of its kind is
    replaced by one of the other. Whatever ends this ends the processes.
    """
    waiting: dict[bool, deque[Job]] = {True: deque(), False: deque()}
    for job in dict.fromkeys(jobs):
        waiting[job.interpret].append(job)
    busy: dict[Connection, tuple[Worker, Job, float]] = {}

    def go_on(worker: Worker | None, interpret: bool) -> None:
        kind = interpret if waiting[interpret] else not interpret
        if worker is not None and (kind != worker.interpret or not waiting[kind]):
            worker.kill()
            worker = None
        if waiting[kind]:
            worker = worker or Worker(interpret=kind, environ=environ)
            job = waiting[kind].popleft()
            busy[worker.connection] = worker, job, time.monotonic() + limit_s
            worker.begin(job)

    try:
        for i in range(workers):
            go_on(None, i % 2 == 0)
        while busy:
            first = min(deadline for _, _, deadline in busy.values())
            answered = wait(list(busy), max(0.0, first - time.monotonic()))
            late = [one for one, (*_, due) in busy.items() if due <= time.monotonic()]
            for ready in dict.fromkeys([*answered, *late]):
                assert isinstance(ready, Connection)
                worker, job, _ = busy.pop(ready)
                answer = worker.answer() if ready in answered else _died(None, limit_s)
                if isinstance(answer.error, WorkerDied):
                    worker.kill()
                    go_on(None, job.interpret)
                else:
                    go_on(worker, job.interpret)
                yield job, answer
    finally:
        for worker, *_ in busy.values():
            worker.kill()


def _serve(connection: Connection, environ: dict[str, str]) -> None:
    die_with_parent()
    os.environ.update(environ)
    # A terminal sends Ctrl-C to every process; the one that waits for this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        value, error, of_machine = None, None, False
        try:
            function, arguments = pickle.loads(message)  # imports the kernels
            value = function(*arguments)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            of_machine = isinstance(raised, OSError)
        connection.send((value, error, of_machine))
