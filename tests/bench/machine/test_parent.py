"""What a process leaves behind is found and ended, whatever session it is in."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from resblock_bench.bench.machine.parent import end_tree
from resblock_bench.bench.machine.proc import descendants

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="has no sub-reapers"),
]

# A child in a session of its own, whose parent ends at once: a daemon.
DAEMON = """
import os, sys, time
from resblock_bench.bench.machine.parent import adopt_orphans, end_descendants
if "adopting" in sys.argv:
    adopt_orphans()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(1000)
    os._exit(0)
os.wait()
if "ending" in sys.argv:
    sys.stdin.readline()
    end_descendants(os.getpid())
    print("ended", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", DAEMON, *request.param]
    pid = None
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            yield process, pid
        finally:
            process.kill()
            if pid is not None and running(pid):
                os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 60
    while running(pid):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.01)


@pytest.mark.parametrize("daemon", [["adopting"]], indirect=True)
def test_a_daemon_ends_with_the_tree_of_who_adopts_it(
    daemon: tuple["subprocess.Popen[str]", int],
) -> None:
    process, pid = daemon
    deadline = time.monotonic() + 60
    while pid not in descendants(process.pid):  # until its parent has ended
        assert time.monotonic() < deadline
    end_tree(process.pid)
    assert process.wait(60) == -signal.SIGKILL
    wait_for_end(pid)


@pytest.mark.parametrize("daemon", [["adopting", "ending"]], indirect=True)
def test_a_process_can_end_what_it_has_adopted_itself(
    daemon: tuple["subprocess.Popen[str]", int],
) -> None:
    process, pid = daemon
    assert process.stdin is not None and process.stdout is not None
    print("go on", file=process.stdin, flush=True)
    assert process.stdout.readline() == "ended\n"
    wait_for_end(pid)
    assert process.poll() is None


@pytest.mark.parametrize("daemon", [[]], indirect=True)
def test_without_adopting_a_daemon_is_not_found(
    daemon: tuple["subprocess.Popen[str]", int],
) -> None:
    process, pid = daemon
    deadline = time.monotonic() + 60
    while pid in descendants(process.pid):
        assert time.monotonic() < deadline
    assert running(pid)


def test_the_tree_of_a_process_that_has_ended_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    end_tree(process.pid)
