import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from resblock_bench.bench.machine.proc import available_bytes, oom_kills
from resblock_bench.bench.measure.memory_limit import limit_memory

pytestmark = pytest.mark.slow

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
# Everything is imported before the limit is set, as in a cell's process.
BEGIN = """
import msgspec, torch
from resblock_bench.bench.measure.memory_limit import limit_memory
from resblock_bench.bench.records import Cell
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
torch.set_num_threads({threads})
assert limit_memory({mib} * 2**20)
"""


def under_limit(mib: int, code: str, threads: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN.format(mib=mib, threads=threads) + code],
        capture_output=True,
        text=True,
        timeout=600,
    )


@LINUX
def test_the_allocation_over_the_limit_fails_with_torch_s_own_error() -> None:
    code = """
fits = torch.ones(20 * 2**18)
try:
    torch.ones(100 * 2**18)
except RuntimeError as error:
    assert "DefaultCPUAllocator: can't allocate memory" in str(error), error
    print("refused")
print(float(fits.sum()))  # the process lives on
"""
    done = under_limit(64, code)
    assert (done.returncode, done.stdout.split()) == (0, ["refused", str(20 * 2.0**18)]), done


@LINUX
def test_small_allocations_add_up_to_the_limit() -> None:
    code = """
held = []
try:
    while True:
        held.append(torch.ones(2**18))
except RuntimeError as error:
    assert "DefaultCPUAllocator" in str(error), error
print(len(held))
"""
    done = under_limit(64, code)
    assert done.returncode == 0, done
    stacks = 4 * resource.getrlimit(resource.RLIMIT_STACK)[0] // MIB
    assert 56 <= int(done.stdout) <= 64 + stacks + 8, done


@LINUX
def test_threads_and_a_modest_cell_fit() -> None:
    """Sixteen threads' stacks are more than the limit itself; next to none of them is used."""
    code = """
shape = {"resolution": 32, "channels": 64, "out_channels": 64, "emb_channels": 64, "batch": 2}
rest = {"model": None, "dims": 2, "conditioning": "add", "dropout": 0.0, "updown": "none",
        "dtype": "fp32", "layout": "nchw", "mode": "train", "checkpoint": "full", "impl": "fused"}
cell = msgspec.convert({**shape, **rest}, Cell)
cpu = torch.device("cpu")
torch.ones(2**20).sum()  # enough for every thread to start
made = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, cpu, 0), cpu)
print(len(made.results()) > 5)
"""
    done = under_limit(96, code, threads=16)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done


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
