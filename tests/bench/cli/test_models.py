"""Runs of whole models on the command line, in this process but for what measures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.diffusers_configs import CONFIGS as OF_DIFFUSERS
from support.diffusers_configs import TINY, needs_diffusers
from support.models import CONFIGS, NAME, model_cell, register
from support.sweeps import QUICK, rows_of

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


@needs_diffusers
@pytest.mark.slow
def test_a_run_of_a_model_of_diffusers_needs_its_file_only_once(
    run_cli: Callable, tmp_path: Path
) -> None:
    folder, path = tmp_path / "run", tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    axes = ("-a", "workload=model", "-a", f"model={path}", "-a", "batch=1", "-a", "mode=inference")
    done = run_cli("run", *axes, *QUICK, "--output", folder)
    assert done.code == 0, done.out
    rows = rows_of(folder)
    assert rows.keys() == {"reference", "fused"}
    model = rows["fused"].axes.model
    assert f"{model} whole model 8² b1" in " ".join(done.out.split())
    path.unlink()
    done = run_cli("run", "--resume", "--dry-run", "--output", folder)
    assert f"{model} whole model 8² b1" in " ".join(done.out.split())
    assert f"{model} whole model 8² b1" in run_cli("compare", folder).out
    assert run_cli("report", folder).code == 0
    assert f"model={folder}/{model}.json" in (folder / "report.html").read_text()
    given = {"workload": ("model",), "batch": (1,), "mode": ("inference",)}
    found = plan([{**given, "model": (f"{folder}/{model}.json",)}])
    assert {item.cell for item in found} == {row.axes for row in rows.values()}


@needs_diffusers
@pytest.mark.parametrize(
    ("workload", "config", "message"),
    [
        (None, {}, "are not measured alone: use workload=model"),
        ("blocks", {}, "is a model of diffusers, which is run whole: use workload=model"),
        ("model", OF_DIFFUSERS["vae"], "is planned, and not measured; give a UNet"),
        ("model", {"sample_size": [8, 16]}, "sample_size is 8 by 16: square images are measured"),
        ("model", {"dropout": 1.0}, "dropout is 1.0: it is measured from 0 to below 1"),
        ("model", {"layers_per_blok": 1}, "did you mean 'layers_per_block'"),
        ("model", {"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel"),
        ("model", None, "No such file or directory; check the path"),
    ],
)
def test_a_config_that_is_not_measured_is_one_sentence(
    run_cli: Callable, tmp_path: Path, workload: str | None, config: dict | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if config is not None:
        whole = config is OF_DIFFUSERS["vae"]
        path.write_text(json.dumps(config if whole else {**TINY, **config}))
    given = [] if workload is None else ["-a", f"workload={workload}"]
    done = run_cli("run", *given, "-a", f"model={path}", "--dry-run")
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1


@needs_diffusers
@pytest.mark.parametrize("verb", ["cost", "tune", "plan"])
def test_verbs_about_blocks_refuse_models_of_diffusers(
    run_cli: Callable, tmp_path: Path, verb: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    done = run_cli(verb, "-a", f"model={path}")
    assert done.code == 2
    assert "blocks of another kind" in done.err
