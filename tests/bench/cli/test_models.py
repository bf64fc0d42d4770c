"""Runs of whole models on the command line, in this process but for what measures."""

from collections.abc import Callable

import pytest
from support.models import CONFIGS, NAME, model_cell, register

from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.grid.presets import named
from resblock_bench.bench.measure.predict_memory import predict_memory
from resblock_bench.bench.units import format_mib


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, CONFIGS["unet"])


@pytest.mark.usefixtures("tiny")
def test_a_dry_run_predicts_the_memory_of_models(run_cli: Callable) -> None:
    done = run_cli("run", "-a", "workload=model,blocks", "-a", f"model={NAME}", "--dry-run")
    assert done.code == 0, done.err
    for workload in ("model", "blocks"):
        for impl in ("reference", "fused"):
            cell = model_cell(CONFIGS["unet"], batch=8, workload=workload, impl=impl)
            memory = predict_memory(cell)
            assert memory is not None
            assert format_mib(memory.peak_bytes) in done.out


@pytest.mark.usefixtures("tiny")
def test_a_batch_that_fits_nowhere_is_predicted_or_said_not_to_be(run_cli: Callable) -> None:
    arguments = ("run", "-a", "workload=model", "-a", f"model={NAME}", "-a", "impl=reference")
    done = run_cli(*arguments, "-a", "batch=1000000", "--dry-run")
    assert done.code == 0, done.err
    assert "GiB" in done.out
    done = run_cli(*arguments, "-a", "batch=16777216", "-a", "mode=inference", "--dry-run")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workload=model"], "workload=model needs a model"),
        (["workload=model", "model=adm-lsun256", "channels=64"], "channels would pick among"),
        (["workload=model", "model=adm-lsun256", "resolution=64"], "resolution would pick among"),
        (["workload=model", "model=adm-lsun255"], "did you mean 'adm-lsun256'"),
        (["model=edm-ffhq64-ddpmpp"], "blocks of another kind"),
    ],
)
def test_what_no_model_has_is_one_sentence(
    run_cli: Callable, arguments: list[str], message: str
) -> None:
    given = [word for argument in arguments for word in ("-a", argument)]
    done = run_cli("run", *given, "--dry-run")
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["cost", "tune", "plan"])
def test_verbs_about_blocks_refuse_whole_models(run_cli: Callable, verb: str) -> None:
    done = run_cli(verb, "-a", "workload=model", "-a", "model=adm-lsun256")
    assert done.code == 2
    assert "workload" in done.err


def test_the_preset_of_models_has_models_and_their_blocks() -> None:
    cells = [item.cell for item in plan(named("models").grids)]
    assert {cell.workload for cell in cells} == {"model", "blocks"}
    assert {cell.mode for cell in cells} == {"train", "inference"}
    assert max(cell.batch for cell in cells) <= 2


def test_models_of_another_block_are_listed_with_what_runs_them(run_cli: Callable) -> None:
    out = run_cli("list").out
    assert "edm-ffhq64-ddpmpp" in out
    assert "with workload=model or blocks only" in " ".join(out.split())
