"""Jobs in worker processes: what each is told, and what is left of those that fail."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.sweeps import children_of, wait_for_death

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.machine import workers
from resblock_bench.bench.machine.answers import answers
from resblock_bench.bench.machine.workers import Job, JobFailed, MachineFailed, WorkerDied, run

pytestmark = pytest.mark.slow

INTERPRET = ("TRITON_INTERPRET",)


@pytest.fixture
def started() -> Callable[[], set[BaseProcess]]:
    """The processes that a test has started and that are still there."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_process_is_of_one_kind(count: int, started: Callable[[], set[BaseProcess]]) -> None:
    wanted = [Job(False, os.getenv, INTERPRET), Job(True, os.getenv, INTERPRET)]
    found = dict(run([*wanted, *wanted], count))
    assert {job.interpret: answer.get() for job, answer in found.items()} == {False: "0", True: "1"}
    assert not started()


def test_whoever_fails_fails_alone() -> None:
    dying = Job(False, os._exit, (3,))
    failing = Job(False, int, ("seven",))
    absent = Job(False, test_a_process_is_of_one_kind, (1,))  # no module that a worker can import
    good = [Job(False, abs, (-i,)) for i in range(4)]
    found = dict(run([good[0], dying, good[1], failing, good[2], absent, good[3]], 2))
    assert [found[job].get() for job in good] == [0, 1, 2, 3]
    with pytest.raises(WorkerDied, match="its process ended with code 3"):
        found[dying].get()
    with pytest.raises(JobFailed, match="ValueError: invalid literal"):
        found[failing].get()
    with pytest.raises(JobFailed):
        found[absent].get()


def test_what_the_operating_system_refuses_is_the_machine_s_and_said_once() -> None:
    refused = [Job(False, os.listdir, (f"/absent/{i}",)) for i in range(3)]
    with pytest.raises(InvalidError, match=r"listing: this machine cannot do it \(FileNotFound"):
        list(answers(refused, Console(quiet=True), "listing"))
    # A job's own error is that of the job.
    failing = Job(False, int, ("seven",))
    ((_, answer),) = answers([failing], Console(quiet=True), "counting")
    assert not isinstance(answer.error, MachineFailed)


def test_whoever_stops_asking_ends_the_processes(
    started: Callable[[], set[BaseProcess]],
) -> None:
    """As Ctrl-C does: the jobs would take an hour."""
    found = run(
        [Job(False, abs, (-1,)), *(Job(True, time.sleep, (3600 + i,)) for i in range(2))], 2
    )
    next(found)
    assert started()
    found.close()
    assert not started()


def test_processes_end_with_the_one_that_asked() -> None:
    script = (
        "import time; from resblock_bench.bench.machine.workers import Job, run;"
        "found = run([Job(False, abs, (-1,)), Job(False, time.sleep, (3600,))], 2);"
        "next(found); print('busy', flush=True); next(found)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        family = children_of(process.pid)
    finally:
        process.kill()
        process.communicate(timeout=300)
    assert family
    wait_for_death(family)


def test_a_process_whose_asker_is_killed_before_it_is_up_begins_nothing() -> None:
    """It would find the job in its pipe, and no death to be told of."""
    script = (
        "import os, time; from resblock_bench.bench.machine.workers import Job, Worker;"
        "worker = Worker(interpret=False); worker.begin(Job(False, time.sleep, (3600,)));"
        "os.kill(os.getpid(), 9)"
    )
    # The output ends when all that hold it have ended.
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=300)
    assert done.returncode == -9


def test_whoever_takes_too_long_is_ended_alone(
    started: Callable[[], set[BaseProcess]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose programs wait for each other never ends where they run one after another."""
    passed = 0.0

    def wait(connections: list[Connection], timeout: float) -> list[Connection]:
        """At first as if the whole time limit had passed."""
        nonlocal passed
        if passed:
            return multiprocessing.connection.wait(connections, timeout)
        passed = timeout
        return []

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed)
    monkeypatch.setattr(workers, "wait", wait)
    monkeypatch.setattr(workers, "time", clock)
    waiting, good = Job(True, time.sleep, (3600,)), Job(True, abs, (-1,))
    found = dict(run([waiting, good], 1))
    assert found[good].get() == 1
    with pytest.raises(WorkerDied, match="stopped after the time limit of 5m00s"):
        found[waiting].get()
    assert not started()
