"""What runs on a GPU only, run to its end on one that is scripted: names, signatures, units."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from rich.console import Console
from support import scripted_gpu
from support.models import CONFIGS, model_cell, register
from support.orders import Given
from support.scripted_gpu import NAME, UUID, installed

from resblock_bench.bench.compiled.norms import Norm
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.gpu import launches, operators
from resblock_bench.bench.machine import visible_gpus
from resblock_bench.bench.measure import ceilings, jobs
from resblock_bench.bench.measure.cell import CellJob, Task
from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.correctness import compute_truth
from resblock_bench.bench.measure.survey import SurveyJob, _look, _Reply
from resblock_bench.bench.measure.telemetry import open_probe
from resblock_bench.bench.measure.workload import DTYPES, Workload
from resblock_bench.bench.records import Row
from resblock_bench.bench.tune import cases
from resblock_bench.bench.tune import gpu as tune_gpu
from resblock_bench.bench.tune.choices import select
from resblock_bench.bench.tune.tune import TuneRequest, tune
from resblock_bench.kernels import dispatch, tuned


@pytest.fixture
def gpu() -> Iterator[None]:
    with installed():
        yield


@pytest.fixture
def on_gpu(
    make_task: Callable[..., Task], measure_task: Callable[..., Row], tmp_path: Path
) -> Callable[..., Row]:
    """The row of a tiny cell on the GPU."""
    return lambda **changes: measure_task(make_task(device="cuda", folder=str(tmp_path), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "inference"},
        {"mode": "forward", "impl": "fused"},
        {"checkpoint": "selective", "dropout": 0.1},
        {"impl": "fused", "checkpoint": "full", "layout": "nhwc", "dtype": "bf16"},
    ],
    ids=["inference", "forward", "dropout", "nhwc"],
)
def test_a_block_is_measured_to_its_end(
    gpu: None, on_gpu: Callable[..., Row], changes: dict[str, object]
) -> None:
    row = on_gpu(**changes)
    assert row.status == "ok", row.reason
    assert row.graph_note is None and row.graph_samples_ms
    assert row.memory is not None and row.memory.method == "cuda_allocator"
    assert (row.device_name, row.device_uuid) == (NAME, UUID)


@pytest.mark.parametrize("workload", ["model", "blocks"])
@pytest.mark.slow
def test_a_model_is_measured_to_its_end(
    gpu: None,
    on_gpu: Callable[..., Row],
    monkeypatch: pytest.MonkeyPatch,
    workload: str,
) -> None:
    register(monkeypatch, CONFIGS["unet"])
    cell = model_cell(CONFIGS["unet"], workload=workload, dtype="fp16")
    row = on_gpu(**msgspec.structs.asdict(cell))
    assert row.status == "ok", row.reason
    assert row.graph_note is None and row.graph_samples_ms


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [("out of memory", "oom", "Tried to allocate"), ("illegal access", "failed", "illegal memory")],
)
def test_what_a_gpu_raises_is_a_row(
    on_gpu: Callable[..., Row], tmp_path: Path, fault: str, status: str, said: str
) -> None:
    with installed(fault):
        row = on_gpu()
    assert row.status == status
    assert said in (row.reason or "")
    assert (row.snapshot is not None) == (fault == "out of memory")


def test_the_machine_is_asked_for_its_gpu_and_its_ceilings(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ceilings.COPY_BYTES, "cuda", (2**22, 2**22))
    monkeypatch.setattr(ceilings, "SAMPLING_S", 0.0)
    monkeypatch.setattr(ceilings, "LARGEST_PRODUCT", 256)
    monkeypatch.setattr(ceilings, "SMALLEST_PRODUCT", dict.fromkeys(DTYPES, 128))
    reply = _look(msgspec.json.encode(SurveyJob("cuda", 1)), Given())
    found = msgspec.json.decode(reply, type=_Reply).environment
    assert found is not None and found.ceilings is not None
    assert (found.gpu, found.gpu_uuid, found.gpu_driver) == (NAME, UUID, "580.1")
    assert found.gpu_memory_bytes == 80 * 2**30


def test_truths_are_computed_on_the_gpu(
    gpu: None, make_task: Callable[..., Task], tmp_path: Path
) -> None:
    job = CellJob(task=make_task(device="cuda"), truths=str(tmp_path / "truths"))
    reply = jobs.compute_site_truths(msgspec.json.encode(job), Given())
    assert msgspec.json.decode(reply, type=jobs.TruthReply) == jobs.TruthReply("ok")
    assert {path.name for path in (tmp_path / "truths").iterdir()} == {"first.npz", "last.npz"}


def test_truths_are_cudnns_which_need_not_try_all_its_algorithms(
    gpu: None, make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are those of eager as it is measured; PyTorch's `flags` turns cuDNN off by default."""
    seen = []
    results = Workload.results
    cudnn = torch.backends.cudnn

    def noted(workload: Workload) -> dict[str, torch.Tensor]:
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32))
        return results(workload)

    monkeypatch.setattr(Workload, "results", noted)
    with cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        compute_truth(make_task().cell, torch.device("cuda", 0), 0, 0)
    assert set(seen) == {(True, False, False)}


@pytest.fixture
def eager_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels cannot run: a launch gives what eager PyTorch does."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(tune_gpu, "launched", lambda case, how: cases.reference(case))


def test_every_kernel_is_launched(
    gpu: None, eager_launches: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launches.carry_out("cuda", 1, ["bf16"]) == 0
    assert capsys.readouterr().out == "16 launches are right, 0 wrong, 0 failed\n"


def test_launches_after_an_illegal_access_are_given_up(
    eager_launches: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: object, how: object) -> None:
        raise RuntimeError(scripted_gpu.ILLEGAL)

    codes: list[int] = []
    monkeypatch.setattr(tune_gpu, "launched", fail)
    monkeypatch.setattr(os, "_exit", codes.append)
    with installed("illegal access"):
        launches.carry_out("cuda", 1, ["fp32"])
    assert codes == [3]
    assert "illegal memory access" in capsys.readouterr().out


def test_operators_are_swept(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(operators, "COPY_ELEMENTS", {"cuda": 2**16, "cpu": 2**16})
    sweep = operators.Sweep(tmp_path / "rows.jsonl", "rules", "cuda", time.monotonic() + 60)
    norm = Norm(
        batch=1, channels=32, positions=16, groups=8, dtype="fp32", layout="nhwc",
        modulation="scale_shift", bias_folded=False, dropout=0.0,
    )  # fmt: skip
    rows = list(sweep.site(operators.Site(norm, "a-model", 4, 512), ("eager", "fused")))
    assert {row.status for row in rows} == {"ok"}
    assert {row.device for row in rows} == {NAME}


def test_a_bucket_is_tuned(
    gpu: None, eager_launches: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = select(["channels=32", "resolution=8", "batch=1", "mode=inference"])
    request = TuneRequest(planned, tmp_path / "table.json", budget_s=2.0)
    assert tune(request, Console(width=200)) in (0, 3)
    text = capsys.readouterr().out
    assert NAME in text.replace("\n", " ") and "1 of 1 buckets" in text
    assert tuned.read(tmp_path / "table.json").arch == "sm_90"


def test_a_probe_reads_the_gpu(gpu: None) -> None:
    with closing(open_probe("cuda", UUID)) as probe:
        found = probe.read()
    assert found.notes == []
    assert (found.sm_clock_mhz, found.power_w, found.foreign_processes) == (1500, 250, 0)


def test_a_gpu_is_found_where_nvml_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does without NVML, of which a container may have nothing."""

    def ask(words: list[str], **options: object) -> SimpleNamespace:
        exec(words[2])
        return SimpleNamespace(stdout=capture.getvalue())

    visible_gpus._asked_of_cuda.cache_clear()
    monkeypatch.setattr(visible_gpus.subprocess, "run", ask)
    with installed("NVML gone"), redirect_stdout(StringIO()) as capture:
        (found,) = visible_gpus.chosen_gpus(())
    assert found == (f"GPU-{UUID}", NAME, 80 * 2**30)
    visible_gpus._asked_of_cuda.cache_clear()

    def fail(words: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(visible_gpus.subprocess, "run", fail)
    with installed("NVML gone"), pytest.raises(UsageError, match="no GPU can be used: GPU is lost"):
        visible_gpus.chosen_gpus(())
    visible_gpus._asked_of_cuda.cache_clear()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("throttling", "the thermal limit held the clocks back for"),
        ("foreign process", "1 other process computed on the GPU"),
        ("NVML gone", "NVML failed: GPU is lost"),
    ],
)
def test_a_disturbed_gpu_says_so(fault: str, said: str) -> None:
    with installed(fault), closing(open_probe("cuda", UUID)) as probe:
        before, after = probe.read(), probe.read()
    found = conditions(before, after, source=probe.source, images=1, threads=1)
    assert said in " ".join([*found.disturbances, *found.notes])
