import errno
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resblock_bench.bench.grid.presets import PRESETS_FILE
from resblock_bench.bench.measure import devices, peers
from resblock_bench.bench.runs.folder import read_run

TINY = ("-a", "channels=32", "-a", "resolution=8", "-a", "batch=1")
TINY += ("--samples", "6", "--threads", "1")


@pytest.mark.slow
def test_the_smoke_preset_runs_from_end_to_end(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli("run", "--preset", "smoke", "--threads", 1, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    run = read_run(tmp_path / "run")
    assert [row.status for row in run.rows] == ["ok"] * 6
    # The third is of what was not disturbed.
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert figures >= {"throughput.png", "throughput.svg", "memory.png", "memory.svg"}
    assert "6 of 6 cells: 6 ok; " in done.out
    assert str(tmp_path / "run") in done.out
    assert max(len(line) for line in done.out.splitlines() if "│" in line) <= 100
    page = tmp_path / "run" / "report.html"
    assert done.out.endswith(f"page: {page}\n")
    assert page.read_text(encoding="utf-8").count("<svg ") >= 2


def test_without_output_the_folder_is_under_here(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESBLOCK_BENCH_MACHINE", "box")
    assert run_cli("run", *TINY, "-a", "impl=reference", "--no-plots").code == 0
    (folder,) = (tmp_path / "results" / "runs" / "box").iterdir()
    assert len(read_run(folder).rows) == 1
    assert not (folder / "figures").exists()


def test_a_wrong_implementation_ends_with_5(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli("run", *TINY, "-a", "impl=reference,wrong", "--output", tmp_path / "run")
    assert done.code == 5
    rows = read_run(tmp_path / "run").rows
    assert [row.status for row in rows] == ["ok", "wrong"]
    assert rows[1].samples_ms is None
    assert "wrong: wrong, 1 cell:" in done.out


def test_a_spent_budget_says_what_is_left_and_ends_with_3(
    run_cli: Callable, tmp_path: Path
) -> None:
    done = run_cli(
        "run", *TINY, "-a", "batch=1,2,3", "--time-budget", "1ms", "--output", tmp_path / "run"
    )
    assert done.code == 2  # batch twice
    done = run_cli(
        "run", *TINY, "-a", "mode=inference,forward", "--time-budget", "1ms",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 3
    left = re.search(r"time budget is spent: (\d) rows are in (.+), (\d) cells are left", done.out)
    assert left is not None
    assert len(read_run(tmp_path / "run").rows) == int(left[1])
    assert int(left[1]) + int(left[3]) == 4


def test_options_reach_the_contract(run_cli: Callable, tmp_path: Path) -> None:
    run_cli(
        "run", "-a", "channels=32", "-a", "resolution=8", "-a", "impl=reference", "--no-plots",
        "--samples", 7, "--max-time", "3s", "--seed", 5, "--threads", 1, "--output", tmp_path / "r",
    )  # fmt: skip
    (row,) = read_run(tmp_path / "r").rows
    contract = row.contract
    assert (contract.min_samples, contract.max_samples, contract.max_time_s) == (7, 7, 3.0)
    assert (contract.seed, row.seed, contract.threads) == (5, 5, 1)
    assert len(row.samples_ms or []) == 7


def test_a_configuration_file_runs(run_cli: Callable, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(
        "[settings]\nmax_samples = 8\n[[grid]]\nchannels = 32\nresolution = 8\nbatch = [1, 2]\n"
        "impl = 'reference'\nmode = 'inference'\n"
    )
    assert run_cli("run", "--config", config, "--no-plots", "--output", tmp_path / "r").code == 0
    assert [row.axes.batch for row in read_run(tmp_path / "r").rows] == [1, 2]


def test_a_dry_run_predicts_and_writes_nothing(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli("run", *TINY, "-a", "checkpoint=none,full", "--dry-run")
    assert done.code == 0
    assert list(tmp_path.iterdir()) == []
    assert "4 cells;" in done.out
    assert "predicted to need" in done.out


def test_the_dry_run_shows_what_a_run_then_measures(run_cli: Callable, tmp_path: Path) -> None:
    dry = run_cli("run", *TINY, "-a", "impl=fused", "--dry-run").out
    run_cli("run", *TINY, "-a", "impl=fused", "--no-plots", "--output", tmp_path / "r")
    (row,) = read_run(tmp_path / "r").rows
    assert row.memory is not None
    assert f"{row.memory.peak_above_baseline_bytes / 2**20:.2f}" in dry


def test_a_cell_that_cannot_be_predicted_is_named_and_does_not_end_the_list(
    run_cli: Callable, add_implementation: Callable
) -> None:
    def fail(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        raise RuntimeError("no fake kernel")

    add_implementation("unpredictable", fail)
    done = run_cli("list", "-a", "channels=32", "-a", "impl=reference,unpredictable")
    assert done.code == 0
    assert "no prediction for unpredictable (1 cell): RuntimeError: no fake kernel" in done.out
    assert "2 cells;" in done.out


def test_list_shows_every_choice(run_cli: Callable) -> None:
    out = run_cli("list").out
    for name in ("smoke", "resolution", "selective", "compiled", "adm-imagenet256-cond"):
        assert name in out


def test_list_shows_the_peers_and_what_each_is_made_for(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_located", lambda module: False)
    monkeypatch.setenv("COLUMNS", "300")
    out = run_cli("list").out
    lines = out.splitlines()
    found = {}
    for at, line in enumerate(lines):
        found.setdefault((line.split() or [""])[0], [text.strip() for text in lines[at : at + 3]])
    assert found["liger"][2] == "no: liger_kernel is not installed: pip install liger-kernel"
    three = "fp32, bf16, fp16; nchw; 1,2,3-D; cuda"
    assert found["liger"][1] == f"inference, forward, train; {three}"
    assert found["vllm-omni"][1] == f"inference; {three}"
    assert found["fused"][1].endswith("cpu, cuda")


def test_list_says_why_an_implementation_is_not_usable(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "no: torch.compile needs a C++ compiler" in " ".join(run_cli("list").out.split())


def test_list_with_a_selection_shows_its_cells(run_cli: Callable) -> None:
    out = run_cli("list", "-a", "model=iddpm-cifar10-uncond", "-a", "resolution=4").out
    assert "256 4² b8 p=0.3" in out
    assert "512→256 4² b8 p=0.3" in out
    assert "4 cells;" in out


def test_env_shows_the_machine(run_cli: Callable) -> None:
    done = run_cli("env")
    assert done.code == 0
    assert "usable_cpus" in done.out
    assert torch.__version__ in done.out
    assert "tested together" in done.out
    assert "mend" in done.out


def test_plot_draws_again(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    without = run_cli("run", *TINY, "--no-plots", "--output", folder)
    assert without.out.endswith(f"its page is written by: resblock-bench report {folder}\n")
    done = run_cli("plot", folder)
    assert done.code == 0
    assert (tmp_path / "run" / "figures" / "throughput.png").stat().st_size > 1000
    assert "throughput.svg" in done.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli("run", *TINY, "--device", "cuda", "--output", tmp_path / "run")
    assert done.code == 2
    assert "use --device cpu" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-a", "resolutoin=8"], "did you mean 'resolution'"),
        (["run", "-a", "dtype=fp8"], "fp32, bf16, fp16"),
        (["run", "-a", "impl=fusd"], "did you mean 'fused'"),
        (["run", "-a", "model=adm"], "unknown value of axis 'model'"),
        (["run", "-a", "channels=48"], "multiple of 32"),
        (["run", "-a", "resolution=[8:4:x2]"], "does not ascend"),
        (["run", "-a", "mode=inference", "-a", "checkpoint=full"], "has no cell"),
        (["run", "--preset", "cup"], "did you mean 'cpu'"),
        (["run", "--preset", "cpu", "-a", "resolution=17"], "no block of"),
        (["run", "--config", "absent.toml"], "cannot read absent.toml"),
        (["run", "--config", "bad.toml"], "bad.toml is not valid TOML"),
        (["run", "--device", "tpu"], "unknown device 'tpu': it is one of cpu, cuda"),
        (["run", "--time-budget", "8"], "'8' is not a duration"),
        (["run", "--max-time", "fast"], "'fast' is not a duration"),
        (["run", "--samples", "0"], "'--samples'"),
        (["run", "--nonsense"], "--nonsense"),
        (["run", *TINY, "--output", "file"], "file"),
        (["run", *TINY, "--output", "file/run"], "file/run cannot be written (Not a directory)"),
        (["run", *TINY, "--output", "old"], "old already holds a run: continue it with --resume"),
        (["list", "-a", "dtype=fp8"], "fp32, bf16, fp16"),
        (["plot", "absent"], "absent is not a run folder"),
        (["plot", "old"], "old is not a run folder: plan.json"),
        (["plot"], "RUN"),
        (["measure"], "measure"),
    ],
    ids=lambda value: " ".join(value).replace("/", "_") if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_2(
    run_cli: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cells.jsonl").write_text("{}\n")
    (tmp_path / "bad.toml").write_text("[[grid]\n")
    before = sorted(tmp_path.rglob("*"))
    done = run_cli(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert "╭" not in done.err
    if done.err.startswith("resblock-bench: "):
        assert done.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_help_does_not_wait_for_pytorch() -> None:
    code = "import sys, resblock_bench.bench.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_opening_a_device_fixes_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        devices.open_device("cpu", 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_columns_set_the_width_where_there_is_no_terminal(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = run_cli("env").out
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run_cli("env").out
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, wide.splitlines()))


def _in_a_shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, with its streams redirected."""
    script = f'exec "$0" -m resblock_bench.bench "$@" {redirection}'
    return subprocess.run(
        ["/bin/sh", "-c", script, sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_the_output_cannot_encode_is_replaced(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    done = run_cli("list")
    sys.stdout.flush()
    assert (done.code, done.err) == (0, "")
    assert written.getvalue().isascii()
    assert b"presets" in written.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_output_is_one_sentence_and_3() -> None:
    done = _in_a_shell(">/dev/full", "list")
    assert done.returncode == 3
    assert "its output cannot be written (No space left on device): make room" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_closed_streams_are_no_obstacle(tmp_path: Path) -> None:
    arguments = (*TINY, "-a", "impl=reference", "--no-plots", "--output", str(tmp_path / "run"))
    done = _in_a_shell("<&- >&- 2>&-", "run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = read_run(tmp_path / "run").rows
    assert row.status == "ok"
    assert row.floor is not None, "the machine's ceilings are known"


def test_dev_null_stands_for_the_output_where_that_alone_is_closed() -> None:
    """So that no file of this program, nor of what it starts, takes its number."""
    code = (
        "import os; from resblock_bench.bench.cli import main; main._prepare_streams(); "
        "assert os.path.samefile('/dev/fd/1', '/dev/null') and os.get_inheritable(1)"
    )
    command = ["/bin/sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_version_is_shown_without_a_verb(run_cli: Callable) -> None:
    done = run_cli("--version")
    assert done.code == 0
    assert done.out.splitlines()[0] == f"resblock-bench {metadata.version('resblock-bench')}"
    assert f"torch {torch.__version__}" in done.out


def test_the_command_that_goes_on_is_the_one_that_was_given(
    run_cli: Callable, tmp_path: Path
) -> None:
    done = run_cli(
        "run", *TINY, "-a", "mode=inference,forward", "--time-budget", "1ms", "--timeout", "4m",
        "--format", "csv", "--no-plots", "--output", tmp_path / "my run",
    )  # fmt: skip
    again = (
        "go on with: resblock-bench run --time-budget 1ms --timeout 4m --format csv --no-plots "
        f"--resume --output '{tmp_path / 'my run'}'"
    )
    assert again in done.out
    words = shlex.split(again.partition("resblock-bench ")[2])
    assert run_cli(*words).code in (0, 3)


def test_a_copied_preset_runs(run_cli: Callable, tmp_path: Path) -> None:
    done = run_cli("run", "--config", PRESETS_FILE, "--preset", "smoke", "--dry-run")
    assert done.code == 0
    assert "6 cells" in done.out


@pytest.mark.parametrize("words", [["plot", "x\udcff"], ["run", "--output", "\udc80"]])
def test_names_that_no_file_can_hold_are_refused(run_cli: Callable, words: list[str]) -> None:
    done = run_cli(*words)
    assert done.code == 2
    assert "is not text in UTF-8" in done.err


def test_a_folder_that_is_no_more_is_said(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = run_cli("list")
    assert done.code == 2
    assert "the current folder is no more" in done.err


def test_an_error_of_the_machine_is_a_sentence(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/media/cd")

    monkeypatch.setattr("resblock_bench.bench.cli.listing.choices", fail)
    done = run_cli("list")
    assert done.code == 3
    assert done.err == (
        "resblock-bench: ended before it was done: /media/cd: Read-only file system\n"
    )


def test_what_a_refusal_quotes_steers_no_terminal(run_cli: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31mred"
    done = run_cli("plot", folder)
    assert f"{tmp_path}/[31mred is not a run folder" in done.err
