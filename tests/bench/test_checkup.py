from pathlib import Path

import pytest

from resblock_bench.bench.checkup import Finding, findings


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resblock_bench.bench.checkup.gpu_findings", list)


def found(root: Path, files: dict[str, str]) -> dict[str, Finding]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {finding.topic: finding for finding in findings(root)}


@pytest.mark.parametrize(
    ("topic", "good", "bad", "advice"),
    [
        (
            "CPU governor",
            {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n"},
            {"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n"},
            "'performance'",
        ),
        ("load average", {"proc/loadavg": "0.10 2 3"}, {"proc/loadavg": "3.00 2 3"}, "other work"),
        (
            "power",
            {"sys/class/power_supply/AC/online": "1\n"},
            {"sys/class/power_supply/AC/online": "0\n"},
            "plug it in",
        ),
        (
            "memory",
            {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 7000 kB\n"},
            {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 700 kB\n"},
            "close what holds it",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_what_is_wrong_is_advised_on(
    tmp_path: Path, topic: str, good: dict[str, str], bad: dict[str, str], advice: str
) -> None:
    assert found(tmp_path, good)[topic].advice is None
    assert advice in (found(tmp_path, {**good, **bad})[topic].advice or "")


def test_more_threads_than_granted_cpus_is_advised_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    quota = {"sys/fs/cgroup/cpu.max": "100000 100000"}
    assert "OMP_NUM_THREADS=1" in (found(tmp_path, quota)["threads"].advice or "")


def test_a_machine_that_shows_nothing_is_no_error(tmp_path: Path) -> None:
    assert set(found(tmp_path, {})) == {"CPU governor", "threads"}
