import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import limited_functions

from resblock_bench.bench.machine.channel import Function
from resblock_bench.bench.machine.proc import available_bytes, oom_kills
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.measure.memory_limit import limit_memory

pytestmark = pytest.mark.slow

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")


@pytest.fixture
def under_limit() -> Iterator[Callable[..., str]]:
    """What a function says of a process that may allocate so many MiB more. As in a cell's,
    everything is imported before."""
    made = Processes()

    def run(function: Function, mib: int, threads: int = 2) -> str:
        ending = made.run(function, f"{mib} {threads}".encode(), limit_s=300)
        assert ending.reply is not None, ending
        return ending.reply.decode()

    yield run
    made.close()


@LINUX
def test_the_allocation_over_the_limit_fails_with_torch_s_own_error(
    under_limit: Callable[..., str],
) -> None:
    said = under_limit(limited_functions.allocate_too_much, 64)
    assert said == f"refused, and {20 * 2.0**18} go on"


@LINUX
def test_small_allocations_add_up_to_the_limit(under_limit: Callable[..., str]) -> None:
    stacks = 4 * resource.getrlimit(resource.RLIMIT_STACK)[0] // MIB
    assert 56 <= int(under_limit(limited_functions.allocate_mebibytes, 64)) <= 64 + stacks + 8


@LINUX
def test_threads_and_a_modest_cell_fit(under_limit: Callable[..., str]) -> None:
    """Sixteen threads' stacks are more than the limit itself; next to none of them is used."""
    assert under_limit(limited_functions.compute_a_cell, 96, threads=16) == "True"


def test_where_nothing_is_counted_nothing_is_limited(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert not limit_memory(MIB, tmp_path)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:  8000 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "500\n",
    "sys/fs/cgroup/a/memory.max": "3000\n",
    "sys/fs/cgroup/a/memory.current": "2000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 100\ninactive_file 400\nactive_file 50\n",
}
V1 = {
    "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/job\n0::/\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000\n",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "3000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "70000\n",
}


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, None),
        (MEMINFO, 8000 * 1024),
        ({**MEMINFO, **V2}, 1400),
        ({**MEMINFO, **V1}, 2000),
        # A container that does not see its path sees its limit at the top.
        (
            {
                "proc/self/cgroup": "0::/unseen\n",
                "sys/fs/cgroup/memory.max": "900\n",
                "sys/fs/cgroup/memory.current": "1000\n",
            },
            0,
        ),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n"}, 8000 * 1024),
    ],
    ids=["nothing", "machine", "version 2", "version 1", "container over its limit", "no limit"],
)
def test_the_tightest_bound_counts(
    tmp_path: Path, contents: dict[str, str], expected: int | None
) -> None:
    assert available_bytes(files(tmp_path, contents)) == expected


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, None),
        ({"proc/vmstat": "oom_kill_other 9\noom_kill 3\n"}, 3),
        (
            {
                **V2,
                "proc/vmstat": "oom_kill 3\n",
                "sys/fs/cgroup/a/b/memory.events": "low 0\noom 7\noom_kill 2\noom_group_kill 0\n",
            },
            2,
        ),
        (
            {
                **V1,
                "proc/vmstat": "oom_kill 3\n",
                "sys/fs/cgroup/memory/job/memory.oom_control": (
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
                ),
            },
            5,
        ),
    ],
    ids=["nothing", "system", "version 2", "version 1"],
)
def test_kills_are_those_of_the_cgroup_if_it_counts(
    tmp_path: Path, contents: dict[str, str], expected: int | None
) -> None:
    assert oom_kills(files(tmp_path, contents)) == expected


@LINUX
def test_this_machine_has_memory() -> None:
    available = available_bytes()
    assert available is not None
    assert MIB < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
