"""What a process waited for a CPU."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from resblock_bench.bench.machine.proc import waited_for_cpu_s


def test_the_wait_of_all_threads_is_counted(tmp_path: Path) -> None:
    for thread, text in {"7": "5 1500000000 3\n", "8": "1 250000000 1\n", "9": ""}.items():
        (tmp_path / "proc/7/task" / thread).mkdir(parents=True)
        (tmp_path / "proc/7/task" / thread / "schedstat").write_text(text)
    assert waited_for_cpu_s(7, tmp_path) == 1.75
    assert waited_for_cpu_s(8, tmp_path) == 0.0


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel counts no waits")
def test_two_on_one_cpu_wait_for_each_other() -> None:
    context = multiprocessing.get_context("spawn")
    cpu = min(os.sched_getaffinity(0))
    two = [context.Process(target=_busy, args=(cpu,)) for _ in range(2)]
    for process in two:
        process.start()
    try:
        pids = [process.pid or 0 for process in two]
        until = time.monotonic() + 60.0
        while min(map(waited_for_cpu_s, pids)) < 0.05:
            assert time.monotonic() < until, "who shares a CPU waits for it"
            time.sleep(0.01)
    finally:
        for process in two:
            process.kill()
            process.join()


def _busy(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    while True:
        pass
