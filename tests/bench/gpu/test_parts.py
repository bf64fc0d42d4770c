"""What is measured on a GPU: commands that this program takes, in the time that a slice has."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.gpu.estimates import estimate
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


def axes_of(step: GpuStep) -> list[str]:
    return [value for word, value in zip(step.words, step.words[1:], strict=False) if word == "-a"]


def cells_of(step: GpuStep) -> list[PlannedCell]:
    """What a step's `run` measures."""
    axes = axes_of(step)
    # The twin of the tests is offered to the step alone.
    return plan([parse_arguments([axis.replace("twin", "compiled") for axis in axes])])


def test_the_first_three_parts_take_20_minutes() -> None:
    first = selected(parts("cuda"), "1,2,3")
    assert sum(part.minutes for part in first) <= 20


def test_every_step_fits_a_slice_or_resumes() -> None:
    for step in all_steps():
        assert step.seconds <= SLICE_S or (step.resumes and step.first_s <= SLICE_S), step.name
        assert step.limit_s >= step.seconds, step.name


def timeout_s(step: GpuStep) -> float:
    return float(step.words[step.words.index("--timeout") + 1].removesuffix("s"))


def test_no_cell_is_stopped_that_takes_as_long_as_it_is_expected_to() -> None:
    for step in all_steps():
        if "--timeout" in step.words:
            held = axes_of(step), float(step.words[-1].removesuffix("s"))
            assert timeout_s(step) >= 2 * estimate(*held).cell, step.name


def test_the_tests_run_in_6_processes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 ran out of the memory of an 80 GB card."""
    for cpus, most in ((64, "6"), (2, "2")):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        counts = [
            step.words[step.words.index("-n") + 1] for step in all_steps() if "-n" in step.words
        ]
        assert counts == [most] * bool(importlib.util.find_spec("xdist"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any("-n" in step.words for step in all_steps())
    (many,) = (step for step in all_steps() if step.name == "tests-many")
    assert "test_every_tier or" in many.words[-1]  # 150 norms, one by one, take too long


def test_a_block_is_measured_by_one_step_and_its_others_by_another() -> None:
    steps = {step.name: step for step in all_steps()}
    shared = [step for step in steps.values() if step.run and step.run != f"runs/{step.name}"]
    assert len(shared) == 2
    for step in shared:
        before = steps[step.run.removeprefix("runs/")]
        assert before.heaviest and not step.heaviest
        assert before.words == step.words


def test_every_run_is_of_cells_that_there_are_and_has_rows_in_a_slice() -> None:
    runs = [step for step in all_steps() if step.run]
    assert len(runs) > 20
    for step in runs:
        assert cells_of(step), step.name
        assert step.resumes and step.first_s <= SLICE_S, step.name


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


def test_models_are_measured_a_pair_at_a_time() -> None:
    """Four that wait for each other do not fit into a GPU's memory."""
    for step in all_steps():
        if step.run and cells_of(step)[0].cell.workload == "model":
            assert len(cells_of(step)) <= 2, step.name


def test_what_steps_name_is_there() -> None:
    assert (ROOT / FAULTS / "faulty_blocks.py").is_file()
    assert (ROOT / "tests/gpu/test_gpu.py").is_file()


@pytest.mark.parametrize("text", ["", "0", "8", "1;2", "one", "1,,2"])
def test_parts_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match="write numbers from 1 to 7"):
        selected(parts("cuda"), text)


def test_parts_come_in_order_of_worth_however_they_are_named() -> None:
    assert [part.number for part in selected(parts("cuda"), "3, 1")] == [1, 3]
