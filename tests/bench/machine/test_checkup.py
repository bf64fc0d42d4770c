from pathlib import Path

import pytest

from resblock_bench.bench.machine.checkup import Fact, cpu_facts, versions_fact
from resblock_bench.kernels import versions

CORES = "".join(
    f"processor : {cpu}\nmodel name : Test CPU\nphysical id : 0\ncore id : {cpu // 2}\n\n"
    for cpu in range(4)
)


def found(root: Path, files: dict[str, str]) -> dict[str, Fact]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {finding.topic: finding for finding in cpu_facts(root)}


@pytest.mark.parametrize(
    ("topic", "good", "bad", "advice", "command"),
    [
        (
            "CPU governor",
            {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n"},
            {"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n"},
            "'performance'",
            "sudo cpupower frequency-set -g performance",
        ),
        (
            "turbo",
            {"sys/devices/system/cpu/intel_pstate/no_turbo": "1\n"},
            {"sys/devices/system/cpu/intel_pstate/no_turbo": "0\n"},
            "switch it off",
            "echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo",
        ),
        (
            "turbo",
            {"sys/devices/system/cpu/cpufreq/boost": "0\n"},
            {"sys/devices/system/cpu/cpufreq/boost": "1\n"},
            "switch it off",
            "echo 0 | sudo tee /sys/devices/system/cpu/cpufreq/boost",
        ),
        (
            "SMT",
            {"sys/devices/system/cpu/smt/active": "0\n", "proc/cpuinfo": CORES},
            {"sys/devices/system/cpu/smt/active": "1\n"},
            "one a core",
            "resblock-bench run --threads 2",
        ),
        (
            "load average",
            {"proc/loadavg": "0.10 2 3"},
            {"proc/loadavg": "3.00 2 3"},
            "other work",
            "ps -eo pid,user,pcpu,args --sort=-pcpu | head",
        ),
        (
            "power",
            {"sys/class/power_supply/AC/online": "1\n"},
            {"sys/class/power_supply/AC/online": "0\n"},
            "plug it in",
            None,
        ),
        (
            "memory",
            {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 7000 kB\n"},
            {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 700 kB\n"},
            "close what holds it",
            "ps -eo pid,user,rss,args --sort=-rss | head",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_what_is_wrong_is_advised_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topic, good, bad, advice, command
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    fine = found(tmp_path, good)[topic]
    assert (fine.advice, fine.command) == (None, None)
    mend = found(tmp_path, {**good, **bad})[topic]
    assert advice in (mend.advice or "")
    assert mend.command == command


def test_smt_is_fine_where_each_core_has_one_usable_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    files = {"sys/devices/system/cpu/smt/active": "1\n", "proc/cpuinfo": CORES}
    assert found(tmp_path, files)["SMT"] == Fact("SMT", "on")


def test_more_threads_than_granted_cpus_is_advised_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    quota = {"sys/fs/cgroup/cpu.max": "100000 100000"}
    finding = found(tmp_path, quota)["threads"]
    assert "cgroup quota 1" in finding.found
    assert finding.command == "export OMP_NUM_THREADS=1"


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("memory.max", "2097152\n", "cgroup limit 2.0 MiB"),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "2097152\n", "cgroup limit 2.0 MiB"),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_the_cgroups_memory_limit_is_shown(tmp_path: Path, name, text, shown) -> None:
    memory = {
        "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 7000 kB\n",
        "proc/self/cgroup": "1:memory:/\n0::/\n",
    }
    finding = found(tmp_path, {**memory, f"sys/fs/cgroup/{name}": text})["memory"]
    assert ("cgroup" in finding.found) == (shown is not None)
    assert (shown or "available") in finding.found


def test_the_processor_is_named(tmp_path: Path) -> None:
    assert found(tmp_path, {"proc/cpuinfo": CORES})["CPU"].found == "Test CPU"


def test_a_machine_that_shows_nothing_is_no_error(tmp_path: Path) -> None:
    assert set(found(tmp_path, {})) == {"CPU", "CPU governor", "threads"}


def test_a_pair_of_versions_that_nobody_tested_is_to_be_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: versions.LOCKED)
    assert versions_fact().advice is None
    monkeypatch.setattr(versions, "installed", lambda: versions.Pair("2.7.0", "3.6.0"))
    finding = versions_fact()
    assert finding.found.startswith("torch 2.7.0, triton 3.6.0: not tested together")
    assert finding.advice is not None and "2.6.0 with 3.2.0" in finding.advice
