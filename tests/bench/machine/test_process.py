import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import light_functions as functions
from support.process_functions import state

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.machine import process
from resblock_bench.bench.machine.process import (
    OUTPUT_BYTES,
    Ending,
    Processes,
    ProcessesClosed,
    Server,
)

pytestmark = pytest.mark.slow


LIGHT = "resblock_bench.bench.machine.channel"
"""For a server that starts at once, of which no cell is measured: it imports nothing else."""


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    made.run(functions.echo, b"")  # limits begin with a server that has imported everything
    yield made
    made.close()


def alive(group: int) -> bool:
    """Whether a process of the group still runs; a dead one may wait to be reaped."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def died(group: int) -> bool:
    """Whether a killed group is gone: what its kernel still does for it takes a moment."""
    deadline = time.monotonic() + 60
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(group)


def test_every_call_has_a_process_of_its_own(processes: Processes) -> None:
    endings = [processes.run(functions.echo, b"pid ") for _ in range(2)]
    pids = {ending.reply for ending in endings}
    assert len(pids) == 2
    assert f"pid {os.getpid()}".encode() not in pids
    assert {(ending.exit_code, ending.phase) for ending in endings} == {(0, "echoing")}


def test_a_process_begins_warm_and_clean(processes: Processes) -> None:
    reply = processes.run(state, b"").reply
    assert reply is not None
    warm, cuda, threads = reply.decode().split()
    assert (warm, cuda) == ("True", "False")
    assert int(threads) <= 2  # no pool was started, but NumPy's


def test_variables_are_set_for_one_call(processes: Processes) -> None:
    given = processes.run(functions.environment, b"GREETING", environment={"GREETING": "hello"})
    assert given.reply == b"hello"
    assert processes.run(functions.environment, b"GREETING").reply == b"absent"


def test_what_hangs_is_ended_with_all_that_it_started(processes: Processes, tmp_path: Path) -> None:
    note = tmp_path / "group"
    ending = processes.run(functions.hang, str(note).encode(), limit_s=2)
    assert (ending.reply, ending.exit_code, ending.phase) == (None, None, "hanging")
    assert "I hang" in ending.output
    assert died(int(note.read_text()))


def test_of_a_megabyte_of_output_the_end_is_kept(processes: Processes) -> None:
    ending = processes.run(functions.print_much, b"")
    assert ending.reply == b"done"
    assert ending.output.endswith("x the end\n")
    assert len(ending.output) == OUTPUT_BYTES


def test_an_exception_leaves_its_traceback(processes: Processes) -> None:
    ending = processes.run(functions.fail, b"")
    assert (ending.reply, ending.exit_code, ending.phase) == (None, 1, "failing")
    assert "ValueError: no good" in ending.output


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_signal_is_reported(processes: Processes, number: signal.Signals) -> None:
    ending = processes.run(functions.end_by_signal, str(int(number)).encode())
    assert (ending.reply, ending.exit_code) == (None, -number)


def test_a_reply_larger_than_a_pipe_comes_whole(processes: Processes) -> None:
    reply = processes.run(functions.large_reply, b"3000000").reply
    assert reply == b"r" * 3_000_000


def test_closing_ends_what_runs_and_refuses_more(processes: Processes, tmp_path: Path) -> None:
    note = tmp_path / "group"
    endings = []

    def work() -> None:
        endings.append(processes.run(functions.hang, str(note).encode()))

    thread = threading.Thread(target=work)
    thread.start()
    while not note.exists() or not note.read_text():
        time.sleep(0.01)
    processes.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert [ending.exit_code for ending in endings] == [-signal.SIGKILL]
    with pytest.raises(ProcessesClosed):
        processes.run(functions.echo, b"")


def test_several_threads_get_their_own_replies(processes: Processes) -> None:
    replies: dict[int, bytes | None] = {}

    def work(number: int) -> None:
        replies[number] = processes.run(functions.echo, f"{number} ".encode()).reply

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: (reply or b"").split()[0] for number, reply in replies.items()} == {
        number: str(number).encode() for number in range(8)
    }
    assert len(set(replies.values())) == 8


def test_the_process_that_waits_imports_little_of_what_cells_need() -> None:
    """Triton and PyTorch's compiler are 140 MB."""
    code = (
        "import sys, resblock_bench.bench.sweep.sweep\n"
        "large = ('triton', 'torch._dynamo', 'matplotlib', 'pandas')\n"
        "print([name for name in large if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_closing_ends_a_process_that_is_just_starting(tmp_path: Path) -> None:
    for _ in range(5):
        made = Processes()
        thread = threading.Thread(target=made.run, args=(functions.hang, bytes(tmp_path / "x")))
        thread.start()
        while not made._running:
            time.sleep(0.0005)
        made.close()
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_at_any_point_of_a_start_is_quiet(tmp_path: Path, number: str) -> None:
    """Of a process whose start was left halfway nobody would know, and it would go on."""
    note = tmp_path / "group"
    code = f"""
import signal, socket, subprocess
from support import light_functions as functions
from resblock_bench.bench.machine import process
from resblock_bench.bench.machine.process import Process, Processes, Server
from resblock_bench.bench.terminal import terminable

def interrupted(function):
    def call(*arguments, **options):
        signal.raise_signal(signal.{number})
        return function(*arguments, **options)
    return call

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` takes away
process._PRELOAD = {LIGHT!r}
server = Server()
processes = Processes(server)
for module, name in (
    (subprocess, "Popen"), (socket.socket, "recv"), (socket, "send_fds"), (Process, "_told")
):
    whole = getattr(module, name)
    setattr(module, name, interrupted(whole))
    try:
        with terminable():
            processes.run(functions.hang, {str(note)!r}.encode())
    except KeyboardInterrupt:
        print(name, len(processes._running), server.up)
    setattr(module, name, whole)
processes.close()
server.close()
"""
    paths = [str(Path(functions.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    told = ["Popen 0 False", "recv 0 False", "send_fds 1 True", "_told 2 True"]
    assert done.stdout.splitlines() == told
    assert done.stderr == ""
    assert not note.exists()


def test_a_process_is_talked_with_until_it_replies(processes: Processes) -> None:
    process = processes.start(functions.converse, b"first")
    said = [process.receive(60)]
    for word in (b"second", b"end"):
        process.send(word)
        said.append(process.receive(60))
    assert said == [b"FIRST", b"SECOND", None]
    ending = process.finish(60)
    assert (ending.reply, ending.exit_code, ending.phase) == (b"2 heard", 0, "conversing")


def test_who_says_nothing_in_time_may_still_be_heard(processes: Processes) -> None:
    process = processes.start(functions.converse, b"")
    assert process.receive(60) == b""
    assert process.receive(0.05) is None
    process.send(b"later")
    assert process.receive(60) == b"LATER"
    assert process.finish(0.05).problem(0.05)[0] == "timeout"


def test_a_message_of_megabytes_comes_whole(processes: Processes) -> None:
    process = processes.start(functions.converse, b"x")
    process.send(b"m" * 3_000_000)
    assert [len(process.receive(60) or b"") for _ in range(2)] == [1, 3_000_000]
    process.send(b"end")
    assert process.finish(60).reply == b"2 heard"


def test_who_has_died_is_not_waited_for(processes: Processes) -> None:
    process = processes.start(functions.converse, b"x")
    process.kill()
    while process.receive() is not None:
        pass
    process.send(b"nobody hears this")
    assert process.finish().exit_code == -signal.SIGKILL
    again = process.finish()
    assert (again.reply, again.exit_code) == (None, -signal.SIGKILL)


def test_a_process_that_waits_ends_with_who_started_it(tmp_path: Path) -> None:
    """However the latter dies."""
    code = f"""
import os, signal
from support import light_functions as functions
from resblock_bench.bench.machine import process
from resblock_bench.bench.machine.process import Processes

process._PRELOAD = {LIGHT!r}
process = Processes().start(functions.tell_group, {str(tmp_path / "group")!r}.encode())
assert process.receive() == b"written"
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = [str(Path(functions.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert done.returncode == -signal.SIGKILL
    assert died(int((tmp_path / "group").read_text()))


def test_a_server_that_was_killed_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PRELOAD", LIGHT)
    server = Server()
    made = Processes(server)
    try:
        first = made.run(functions.parent, b"").reply
        talking = made.start(functions.converse, b"x")
        assert talking.receive(60) == b"X"
        os.kill(int(first or b""), signal.SIGKILL)
        ending = talking.finish(60)
        assert (ending.reply, ending.exit_code) == (None, -signal.SIGKILL)
        second = made.run(functions.parent, b"").reply
        assert second is not None
        assert second != first
        server.close()
        assert not server.up
        assert made.run(functions.parent, b"").reply not in (None, first, second)
    finally:
        made.close()
        server.close()


def test_a_server_has_the_paths_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('no good')\n")
    server = Server([tmp_path])
    with pytest.raises(InvalidError, match=r"cannot be imported: mend(.|\n)*no good"):
        Processes(server).run(functions.echo, b"")
    assert not server.up


@pytest.mark.parametrize(
    ("ending", "status", "sentence"),
    [
        (Ending(None, None), "timeout", "stopped after the time limit of 8.0s"),
        (
            Ending(None, None, "timing", "last"),
            "timeout",
            "stopped after the time limit of 8.0s, in its phase 'timing'",
        ),
        (
            Ending(None, -11, "check", "a trace"),
            "crashed",
            "killed by SIGSEGV, in its phase 'check'",
        ),
        (Ending(None, -9, output="last"), "crashed", "killed by SIGKILL"),
        (Ending(None, -9, starved=True), "oom", "the system ran out of memory: killed by SIGKILL"),
        (Ending(None, -35), "crashed", "killed by signal 35"),
        (Ending(None, 7, output=" \n"), "crashed", "its process ended with code 7"),
        (
            Ending(None, 1, "check", "Traceback\nValueError: no good\n"),
            "crashed",
            "its process ended with code 1, in its phase 'check': ValueError: no good",
        ),
    ],
)
def test_how_a_process_ended_is_one_sentence(ending: Ending, status: str, sentence: str) -> None:
    assert ending.problem(8.0) == (status, sentence)


@pytest.mark.parametrize(
    ("number", "kills", "starved"),
    [
        (signal.SIGKILL, (3, 4), True),
        (signal.SIGKILL, (3, 3), False),
        (signal.SIGKILL, (None, None), False),
        (signal.SIGTERM, (3, 4), False),
    ],
)
def test_a_kill_by_the_system_s_out_of_memory_killer_is_told_apart(
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kills: tuple[int | None, int | None],
    starved: bool,
) -> None:
    counts = iter(kills)
    monkeypatch.setattr(process, "oom_kills", lambda: next(counts))
    ending = processes.run(functions.end_by_signal, str(int(number)).encode())
    assert (ending.exit_code, ending.starved) == (-number, starved)
