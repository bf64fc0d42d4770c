"""Profiles of tiny cells, made in this process."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace
from support.models import CONFIGS, model_cell, register

from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import open_device
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.profile import step
from resblock_bench.bench.profile.profiles import Profile
from resblock_bench.bench.records import Ceilings, Cell, Correctness

CEILINGS = Ceilings(
    copy_bytes_per_s=1e10,
    peak_bytes_per_s=2e10,
    matrix_flops_per_s=dict.fromkeys(("fp32", "bf16", "fp16"), 1e11),
)
CHECKED = Correctness(errors={"out": 0.0}, limits={"out": 1.0}, worst="out", dropout=0.0)


@pytest.fixture(scope="session")
def made() -> dict[Cell, Profile]:
    """Those that were made: none twice."""
    return {}


@pytest.fixture
def profiled(
    make_task: Callable[..., Task],
    make_cell: Callable[..., Cell],
    made: dict[Cell, Profile],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Profile]:
    """The profile of a tiny block, or of a tiny model with workload="model", with some fields
    changed."""
    monkeypatch.setattr(step, "STEPS", 1)
    register(monkeypatch, CONFIGS["unet"])

    def profile(**changes: object) -> Profile:
        whole = "workload" in changes
        cell = model_cell(CONFIGS["unet"], **changes) if whole else make_cell(**changes)
        if cell not in made:
            task = make_task()
            found = replace(task.environment, ceilings=CEILINGS)
            task = replace(task, cell=cell, environment=found)
            device = open_device("cpu", 1)
            workload = KINDS[cell.workload].drawn(cell, device.torch_device, 0)
            recorded = step.recorded_step(workload, device)
            counted = step.counted_step(workload, device)
            made[cell] = step.profile_of(task, CHECKED, recorded, counted, 0, [])
        return made[cell]

    return profile
