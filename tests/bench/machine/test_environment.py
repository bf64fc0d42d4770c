import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.checkout import is_checkout, source_state
from resblock_bench.bench.machine import environment
from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.machine.proc import cgroup_quota, usable_cpus
from resblock_bench.bench.records import Environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "pkg")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_checkout_has_its_commit(checkout: Path) -> None:
    assert source_state(checkout / "pkg") == (git(checkout, "rev-parse", "HEAD"), False)


def test_a_changed_file_anywhere_in_the_checkout_makes_it_dirty(checkout: Path) -> None:
    (checkout / "notes").write_text("untracked\n")
    assert source_state(checkout / "pkg")[1] is False
    (checkout / "other.py").write_text("b = 1\n")
    git(checkout, "add", "other.py")
    assert source_state(checkout / "pkg")[1] is True


def test_a_package_installed_inside_another_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout / "venv"
    installed.mkdir()
    (installed / "a.py").write_text("a = 1\n")
    assert source_state(installed) == (None, None)


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert source_state(tmp_path) == (None, None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
        ({"cpu.max": "rubbish"}, None),
    ],
    ids=["v2", "v2 unlimited", "v1", "v1 unlimited", "none", "unreadable"],
)
def test_the_cgroup_quota_is_read(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cgroup_quota(tmp_path) == quota


def test_no_more_threads_than_the_quota_grants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert usable_cpus(tmp_path) == 64
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("250000 100000")
    assert usable_cpus(tmp_path) == 3
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("10000 100000")
    assert usable_cpus(tmp_path) == 1


@pytest.mark.parametrize(
    "name", ["box", "amd-epyc-2cpu", "node1.cluster", "gpu_0", "机器", "電腦", "maße-ñ"]
)
def test_a_machine_s_name_is_its_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("RESBLOCK_BENCH_MACHINE", name)
    assert machine_name() == name


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("my box/../x", "my-box-..-x-"),
        ("..", "unnamed-"),
        (".", "unnamed-"),
        (".hidden", "hidden-"),
        ("a:b", "a-b-"),
        ("a b", "a-b-"),
        ("\x1b[31mred", "31mred-"),
        ("a\n", "a-"),
        ("x" * 300, "x" * 50 + "-"),
        ("机" * 100, "机" * 50 + "-"),
        ("box\udcff", "box-"),
        ("box\udcfe", "box-"),
    ],
)
def test_a_name_that_is_no_folder_s_is_told_apart_by_a_digest(
    monkeypatch: pytest.MonkeyPatch, name: str, begin: str
) -> None:
    monkeypatch.setenv("RESBLOCK_BENCH_MACHINE", name)
    found = machine_name()
    assert found.startswith(begin)
    assert len(found) == len(begin) + 8
    assert len(found.encode()) <= 255
    assert found == machine_name()


def test_two_machines_never_have_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a b", "a:b", "a-b", "a/b", ".", "..", "...", "机器", "電腦", "机 器", "机/器"]
    names += ["box\udcff", "box\udcfe", "box"]
    folders = set()
    for name in names:
        monkeypatch.setenv("RESBLOCK_BENCH_MACHINE", name)
        folders.add(machine_name())
    assert len(folders) == len(names)


def test_one_name_written_in_two_ways_is_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESBLOCK_BENCH_MACHINE", "cafe\u0301")
    composed = machine_name()
    monkeypatch.setenv("RESBLOCK_BENCH_MACHINE", "caf\u00e9")
    assert machine_name() == composed == "caf\u00e9"


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", ".x", "a\n", "\x1b[0m", "x" * 201])
def test_a_stored_name_that_leads_elsewhere_is_refused(found: Environment, name: str) -> None:
    data = msgspec.json.encode(msgspec.structs.replace(found, machine=name))
    with pytest.raises(msgspec.ValidationError, match="machine"):
        msgspec.json.decode(data, type=Environment)


def test_what_is_gathered_survives_json(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.gather(2)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Environment) == found
    assert found.threads == 2
    assert found.versions["resblock-bench"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_a_folder_with_a_strange_pyproject_is_no_checkout(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "pyproject.toml")
    assert not is_checkout(tmp_path)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert source_state(checkout / "pkg") == (None, None)
