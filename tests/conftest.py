"""Set before anything imports the kernels: Triton reads it when a kernel is defined.

The tests in tests/gpu want compiled kernels; `make test-gpu` sets it to 0 beforehand. So do
benchmarks (`-m benchmark`).

Also which machines pytest-benchmark may compare: its hooks are called before the conftest of
tests/benchmarks is known.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.kept_workers import KeptWorkers

# Faulty implementations, for this process and for those that it starts.
FAULTS = str(Path(__file__).parent / "faults")
sys.path.append(FAULTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), FAULTS]))


# What is interpreted is no benchmark. Here and in no hook: pytest imports the conftest of a folder
# that it is given before it calls any.
os.environ.setdefault("TRITON_INTERPRET", "0" if "benchmark" in sys.argv else "1")
# Tables are as wide as it says.
os.environ.pop("COLUMNS", None)


LONGEST_S = 600


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that waits for what never comes fails, with its fixtures' making and ending."""

    def fail(*_: object) -> None:
        pytest.fail(f"not done after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LONGEST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Only where the tests that were collected have imported it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if "triton.runtime.interpreter" in sys.modules:
            from support.interpreting import do_once

            do_once(monkeypatch)
        yield


@pytest.fixture(scope="session")
def kept_workers() -> Iterator[KeptWorkers]:
    from support.kept_workers import KeptWorkers

    kept = KeptWorkers()
    yield kept
    kept.end()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """As a sweep does: what is imported need not be walked by every collection."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    """What a time depends on: not what differs between two runs, nor what is being compared."""
    import torch

    from resblock_bench.bench.machine import environment
    from resblock_bench.bench.machine.proc import usable_cpus

    found = environment.gather(min(torch.get_num_threads(), usable_cpus()))
    machine_info["node"] = found.machine
    machine_info["gpu"], machine_info["gpu_driver"] = found.gpu, found.gpu_driver
    machine_info["threads"] = found.threads
    versions = {name: v for name, v in found.versions.items() if name != "resblock-bench"}
    machine_info["versions"] = versions
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {name: cpu[name] for name in cpu if not name.startswith("hz_")}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info, compared_benchmark):
    """Refuse, where pytest-benchmark warns: another machine's times say nothing about a change."""
    ours, theirs = _flat(machine_info), _flat(compared_benchmark["machine_info"])
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if names:
        raise pytest.UsageError(
            "the benchmarks to compare with are of another machine or other software: "
            + "; ".join(f"{name} {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names)
        )


def _flat(machine_info):
    """Two levels as one, `cpu.count`; with the types that a file has."""
    flat = {}
    for name, value in json.loads(json.dumps(machine_info)).items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): item for key, item in inner.items()}
    return flat
