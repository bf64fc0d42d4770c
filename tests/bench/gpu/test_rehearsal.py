"""All parts to their end on a machine that is stood in for, with a fault in each of them."""

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from support import stand_in_for_gpu
from support.gpu_rows import SITE
from support.made_rows import CALM, HOT, NOTHING
from support.stand_in_for_gpu import ILLEGAL, NO_MEMORY, REFUSED

from resblock_bench.bench import files
from resblock_bench.bench.fit.plans import MemoryPlan
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.gpu import report, steps
from resblock_bench.bench.gpu.outcomes import OVER, StepOutcome, last_outcomes, read_outcomes
from resblock_bench.bench.gpu.parts import GpuPart, parts
from resblock_bench.bench.gpu.steps import SliceRequest
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.records import Environment, Row, cell_id
from resblock_bench.bench.runs.folder import create_run
from resblock_bench.kernels import tuned

SEEDS = {
    "launches": "refused",
    "tests-many": "illegal",
    "tests-tickets": "hang",
    "operators": "breaks the GPU",
    "adm256-256": "wrong",
    "adm256-128": "throttled",
    "adm256-64": "foreign process",
    "adm64-64": "NVML gone",
    "cifar-32": "full disk",
    "tune": "killed",
    "operators-tuned": "NaN",
    "table7-imagenet256-cond": "out of memory",
    "calibrate": "missing module",
}
"""By step. compute-sanitizer is missing besides."""


def made(row: Row, **changes: object) -> Row:
    found = msgspec.structs.replace(row, **changes)
    return msgspec.structs.replace(found, id=cell_id(found.axes, found.contract, found.code))


@pytest.fixture
def rows(some_row: Callable[[str], Row]) -> dict[str, Row]:
    """What `run` leaves, by what went wrong."""
    row = made(some_row("train"), conditions=CALM)
    foreign = msgspec.structs.replace(CALM, disturbances=["1 other process is on the GPU"])
    blind = msgspec.structs.replace(CALM, notes=["NVML has gone: GPU is lost"])
    reason = {"reason": "out: relative error 1 is above its limit 1e-3", **NOTHING}
    return {
        "": row,
        "wrong": made(row, status="wrong", **reason),
        "throttled": made(row, conditions=HOT),
        "foreign process": made(row, conditions=foreign),
        "NVML gone": made(row, conditions=blind),
    }


@pytest.fixture
def machine(
    tmp_path: Path,
    rows: dict[str, Row],
    plan: Plan,
    found: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A GPU that is stood in for; the output folder is returned."""
    python = tmp_path / "python"
    source = Path(stand_in_for_gpu.__file__).read_text()
    python.write_text(f"#!{sys.executable} -S\n{source}")
    python.chmod(0o755)
    folders = {}
    for number, (name, row) in enumerate(rows.items()):
        folders[name] = str(tmp_path / "runs" / str(number))
        with create_run(Path(folders[name]), plan, found) as run:
            run.append(row)
    planned = MemoryPlan(
        subject=Subject(name="adm-imagenet256-cond"), batch=4, images_a_pass=4, devices=[],
        variants=[], failures=[], changes=[], interrupted=False, versions={}, commit=None,
        dirty=None,
    )  # fmt: skip
    told = {
        "seeds": SEEDS,
        "runs": folders,
        "full": str(tmp_path / "full"),
        "operators": [
            msgspec.json.encode(msgspec.structs.replace(SITE, impl=impl)).decode()
            for impl in ("eager", "fused")
        ],
        "plan": str(tmp_path / "plan.json"),
        "table": str(tmp_path / "table.json"),
    }
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(planned))
    table = tuned.Table(arch="sm_90", machine={}, commit="", measured_at="", entries=[])
    (tmp_path / "table.json").write_bytes(msgspec.json.encode(table))
    (tmp_path / "told.json").write_text(json.dumps(told))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "told.json"))
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(steps, "_ask_machine", lambda request, console: "")
    monkeypatch.setattr(steps, "_GRACE_S", 0.2)
    check = files.check_writable

    def checked(path: Path, **options: Any) -> None:
        if (tmp_path / "full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        check(path, **options)

    monkeypatch.setattr(files, "check_writable", checked)
    return tmp_path / "h100"


def patient_parts() -> list[GpuPart]:
    """All parts; what hangs is waited for a second."""
    found = []
    for part in parts("cuda"):
        short = [
            replace(step, limit_s=1.0) if step.name == "tests-tickets" else step
            for step in part.steps
        ]
        found.append(replace(part, steps=tuple(short)))
    return found


@pytest.mark.slow
def test_all_parts_come_to_their_end_with_a_fault_in_each(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = SliceRequest(parts=patient_parts(), output=machine, stage="cuda", seconds=540.0)
    console = Console(width=200)
    assert steps.carry_out(request, console) == 5
    assert "make room" in capsys.readouterr().out
    (machine.parent / "full").unlink()
    for _ in range(3):  # a step that waits for another goes on in the next slice
        assert steps.carry_out(request, console) == 5
    outcomes = read_outcomes(machine)
    last = last_outcomes(outcomes)
    names = [step.name for part in request.parts for step in part.steps]
    assert set(last) == set(names)
    assert {outcome.part for outcome in outcomes} == {1, 2, 3, 4, 5, 6, 7}
    assert {last[name].status for name in names} <= set(OVER)

    def said(name: str, status: str, text: str = "") -> bool:
        return last[name].status == status and text in last[name].sentence

    def turns(name: str) -> list[StepOutcome]:
        return [outcome for outcome in outcomes if outcome.step == name]

    contained = {
        "refused": said("launches", "failed", "1 failed"),
        "illegal": said("tests-many", "failed", ILLEGAL),
        "hang": said("tests-tickets", "timeout"),
        "missing sanitizer": said("memcheck", "skipped") and said("racecheck", "skipped"),
        "breaks the GPU": [one.status for one in turns("operators")] == ["cut", "ok"],
        "wrong": last["adm256-256"].exit_code == 5,
        "throttled": said("adm256-128", "ok"),
        "foreign process": said("adm256-64", "ok"),
        "NVML gone": said("adm64-64", "ok"),
        "full disk": len(turns("cifar-32")) == 1 and said("cifar-32", "ok"),
        "killed": said("tune", "failed", "ended by SIGKILL"),
        "out of memory": said("table7-imagenet256-cond", "failed", NO_MEMORY),
        "missing module": said("calibrate", "failed", "No module named 'scipy'"),
    }
    assert [name for name, held in contained.items() if not held] == []
    assert len(contained) >= 12
    # The other blocks of a run join the one that is wrong.
    faulty = {*SEEDS, "memcheck", "racecheck", "adm256-256-others"}
    assert [name for name in names if name not in faulty and last[name].status != "ok"] == []
    assert REFUSED in (machine / "logs/launches.txt").read_text()

    document = machine.parent / "gpu.md"
    request_ = report.GpuReportRequest(machine, document, predict=False)
    assert report.carry_out(request_, console, console) == 0
    text = document.read_text()
    first, _, rest = text.partition("## The operator at published sites")
    assert "1 failed" in first and "tests-tickets timeout" in first  # contradictions on top
    assert "ended by SIGKILL" in rest
    assert (machine / report.PAGE).stat().st_size > 10_000
