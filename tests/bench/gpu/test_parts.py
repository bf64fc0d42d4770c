"""What is measured on a GPU: commands that this program takes, in the time that a slice has."""

import json
from pathlib import Path

import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.gpu.parts import (
    FAULTS,
    LARGEST,
    TABLE_7,
    GpuStep,
    Stage,
    parts,
    selected,
)
from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import PlannedCell, plan

ROOT = Path(__file__).parents[3]
SLICE_S = 9 * 60 - 15


def all_steps(stage: Stage = "cuda") -> list[GpuStep]:
    return [step for part in parts(stage) for step in part.steps]


def cells_of(step: GpuStep) -> list[PlannedCell]:
    """What a step's `run` measures."""
    axes = [value for word, value in zip(step.words, step.words[1:], strict=False) if word == "-a"]
    # The twin of the tests is offered to the step alone.
    return plan([parse_arguments([axis.replace("twin", "compiled") for axis in axes])])


def test_the_first_three_parts_take_20_minutes() -> None:
    first = selected(parts("cuda"), "1,2,3")
    assert sum(part.minutes for part in first) <= 20


def test_every_step_fits_a_slice_or_resumes() -> None:
    for step in all_steps():
        assert step.seconds <= SLICE_S, step.name
        assert step.limit_s >= step.seconds, step.name


def test_every_run_is_of_cells_that_there_are_and_short() -> None:
    runs = [step for step in all_steps() if step.run]
    assert len(runs) > 20
    for step in runs:
        assert cells_of(step), step.name
        assert step.seconds <= 120, step.name
        assert step.run == f"runs/{step.name}" and step.resumes


def test_names_are_those_of_files_and_none_is_there_twice() -> None:
    names = [step.name for step in all_steps()]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
    for step in all_steps():
        assert not step.after or step.after in names


def test_the_rehearsal_has_the_same_steps() -> None:
    assert [s.name for s in all_steps("cpu")] == [s.name for s in all_steps("cuda")]
    for step in all_steps("cpu"):
        if step.run:
            assert all(item.cell.channels <= 32 for item in cells_of(step)), step.name


def test_models_at_equal_memory_are_ones_that_plan_fits() -> None:
    """There with ADM's attention computed again, which is no mode of the models that are timed."""
    stored = json.loads((ROOT / "results/plan/published.json").read_text())
    place = [size // 2**30 for size in stored["devices"]].index(80)
    largest = {
        (row["model"], recipe["impl"], recipe["checkpoint"]): row["largest"][place]
        for row in stored["rows"]
        if (recipe := row["plan"]["recipe"])
    }
    for model, variants in LARGEST.items():
        batches = list(variants.values())
        assert batches == sorted(batches)
        for variant, batch in variants.items():
            impl, checkpoint = variant.split("/")
            assert TABLE_7[model] < batch <= 0.85 * largest[model, impl, checkpoint]


def test_table_7_is_measured_at_its_own_batches() -> None:
    cells = [item.cell for step in all_steps() if step.run for item in cells_of(step)]
    models = {(c.model, c.batch) for c in cells if c.workload == "model" and c.impl == "fused"}
    assert set(TABLE_7.items()) <= models


def test_what_steps_name_is_there() -> None:
    assert (ROOT / FAULTS / "faulty_blocks.py").is_file()
    assert (ROOT / "tests/gpu/test_gpu.py").is_file()


@pytest.mark.parametrize("text", ["", "0", "7", "1;2", "one", "1,,2"])
def test_parts_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match="write numbers from 1 to 6"):
        selected(parts("cuda"), text)


def test_parts_come_in_order_of_worth_however_they_are_named() -> None:
    assert [part.number for part in selected(parts("cuda"), "3, 1")] == [1, 3]
