"""The verbs as they are typed."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from resblock_bench.bench.gpu import steps
from resblock_bench.bench.gpu.outcomes import opened
from resblock_bench.bench.gpu.parts import PROGRAM, parts
from resblock_bench.bench.machine import visible_gpus
from resblock_bench.bench.records import Environment

ROOT = Path(__file__).parents[3]


def answer(monkeypatch: pytest.MonkeyPatch, found: Environment) -> None:
    """Have the process that is asked about the machine say this."""
    done = subprocess.CompletedProcess([], 0, stdout=msgspec.json.encode(found), stderr=b"")
    monkeypatch.setattr(steps.subprocess, "run", lambda *arguments, **options: done)


def test_a_dry_run_lists_parts_and_minutes_and_makes_nothing(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    code, out, _ = run_cli("gpu-results", "--dry-run", "--output", tmp_path / "gpu")
    assert code == 0
    assert "minutes on an H100, by estimate" in out
    assert "memcheck" in out and "table7-imagenet64-cond" in out
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_a_sentence_says_so(
    run_cli: Callable[..., Any],
    tmp_path: Path,
    found: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(monkeypatch, msgspec.structs.replace(found, gpu=None))
    code, _, err = run_cli("gpu-results", "--output", tmp_path / "gpu")
    assert code == 2
    assert err.startswith("resblock-bench: PyTorch sees no GPU here: ")


@pytest.mark.parametrize("option", ["--parts", "--again"])
def test_an_unknown_part_is_named(run_cli: Callable[..., Any], tmp_path: Path, option: str) -> None:
    code, _, err = run_cli("gpu-results", option, "9", "--output", tmp_path / "gpu")
    assert code == 2
    assert f"{option} '9' is no list of parts" in err


def test_a_machine_is_kept_once(
    tmp_path: Path, found: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, found)
    console = steps.Console(quiet=True)
    request = steps.SliceRequest(parts=[], output=tmp_path, stage="cpu", seconds=60)
    with opened(tmp_path):
        name = steps._ask_machine(request, console)
        assert steps._ask_machine(request, console) == name
    (path,) = (tmp_path / steps.MACHINES).iterdir()
    assert path.stem == name
    assert msgspec.json.decode(path.read_bytes(), type=Environment) == found


def test_a_machine_that_does_not_answer_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("python", 120)

    monkeypatch.setattr(steps.subprocess, "run", fail)
    request = steps.SliceRequest(parts=[], output=tmp_path, stage="cuda", seconds=60)
    assert steps._ask_machine(request, steps.Console(width=300)) == ""
    assert "the machine could not be asked what it is" in capsys.readouterr().out


def test_make_runs_them_with_and_without_an_environment() -> None:
    for arguments, python in ((["PYTHON=python9"], "python9"), ([], "python3")):
        done = subprocess.run(
            ["make", "-n", "gpu-results", "INSTALLED=none", "ARGS=--parts 1", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        shown = " ".join(done.stdout.replace("\\\n", "").split())
        assert f"{python} -m resblock_bench.bench gpu-results --parts 1" in shown
        assert "pip" not in done.stdout


def test_this_program_takes_the_commands_of_steps(
    run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused here, and for want of a GPU. Of each part the first of a verb."""
    monkeypatch.setattr(visible_gpus, "_asked_of_cuda", lambda variable: [])
    asked = {}
    for part in parts("cuda"):
        for step in part.steps:
            if step.words[: len(PROGRAM)] == PROGRAM:
                words = step.words[len(PROGRAM) :]
                asked.setdefault((part.number, words[0]), words)
    verbs = [verb for _, verb in asked]
    assert [verbs.count(verb) for verb in ("run", "tune", "calibrate")] == [4, 1, 1]
    for (_, verb), words in asked.items():
        if verb in ("run", "tune", "calibrate"):
            code, _, err = run_cli(*(word.replace("{output}", str(tmp_path)) for word in words))
            assert code == 2, (words, err)
            assert "no GPU can be used" in err or "PyTorch sees none" in err, (words, err)
