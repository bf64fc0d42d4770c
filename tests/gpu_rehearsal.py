"""All parts of `gpu-results` on a CPU, by the real programs, with faults seeded into them.

    python tests/gpu_rehearsal.py --output /tmp/rehearsal
    python tests/gpu_rehearsal.py --output /tmp/rehearsal --scripted --fault "NVML gone"

What a step would measure on a GPU is tiny and interpreted here, and some steps go wrong: a launch
is refused, results are NaN, a process aborts as after an illegal access, hangs, runs out of memory,
throttles, is killed. Says of each fault whether it was contained: an outcome or a row tells of it,
and every step came to its end. Exit code 1 if one was not. It takes half an hour on two cores;
tests/bench/gpu/test_rehearsal.py does the same in seconds, with a program that stands in for all.

`--scripted` has every process see a GPU (support/scripted_gpu.py), with one fault for all: what
runs on a GPU only runs, but for kernels and torch.compile.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from support.scripted_gpu import FAULTS as SCRIPTED_FAULTS

from resblock_bench.bench.gpu import report, steps
from resblock_bench.bench.gpu.operators import read_rows
from resblock_bench.bench.gpu.outcomes import StepOutcome, last_outcomes, read_outcomes
from resblock_bench.bench.gpu.parts import FAULTS, GpuPart, GpuStep, Stage, parts, selected
from resblock_bench.bench.gpu.results import GpuResults, read_results
from resblock_bench.bench.gpu.steps import SliceRequest

_TESTS = Path(__file__).parent
_LAUNCHES = """
import typer
from resblock_bench.bench.gpu import launches
from resblock_bench.bench.tune import cases
right = cases.launched
def wrong(case, how):
    if how.tier == "C":
        raise RuntimeError("Triton Error [CUDA]: too many resources requested for launch")
    found = right(case, how)
    if how.tier == "B":
        next(iter(found.values())).view(-1)[0] = float("nan")
    return found
cases.launched = wrong
typer.run(launches.main)
"""
_OPERATORS = """
import os, sys, time, typer
from resblock_bench.bench.gpu import operators as o
o.BATCHES = dict.fromkeys(o.BATCHES, 1)
o.chosen = lambda sites, count: sites[-2:]
def broken(x, m, groups):
    if not x.is_contiguous():
        time.sleep(1000)
    print("RuntimeError: CUDA error: an illegal memory access was encountered", flush=True)
    os.abort()
o.fused = broken
typer.run(o.main)
"""

_TUNE = """
import sys
from support.tuning import Scripted
from resblock_bench.bench.cli.main import main
from resblock_bench.bench.tune import tune
tune.open_gpu = Scripted
main(sys.argv[1:])
"""
"""No fault: a GPU whose launches give what eager PyTorch does."""
_TUNED = ("-a", "channels=32", "-a", "resolution=8", "-a", "batch=1")


def seeded(step: GpuStep) -> GpuStep:
    """The step with its fault, if it has one."""

    def program(code: str, start: int) -> GpuStep:
        return replace(step, words=("{python}", "-c", code, *step.words[start:]))

    def block(impl: str, *options: str) -> GpuStep:
        words = [f"impl={impl}" if word.startswith("impl=") else word for word in step.words]
        return replace(step, words=(*words, *options), path=FAULTS)

    faults: dict[str, Callable[[], GpuStep]] = {
        "launches": lambda: program(_LAUNCHES, 3),
        "operators": lambda: replace(program(_OPERATORS, 3), turn_s=60.0),
        "adm256-256": lambda: block("reference,greedy", "--memory-limit", "1GiB"),
        "adm256-128": lambda: block("reference,hanging", "--timeout", "30s"),
        "adm256-64": lambda: block("overheated"),  # of a machine one process is asked
        "adm64-64": lambda: block("reference,segfaulting"),
        "cifar-32": lambda: block("reference,wrong"),
        "adm256-256-nhwc": lambda: block("reference,killed"),
        "adm256-256-fp16": lambda: block("reference,raising"),
        "adm64-64-nhwc": lambda: block("reference,unimportable"),
        "tune": lambda: replace(
            step, words=("{python}", "-c", _TUNE, *step.words[3:], *_TUNED), path="tests"
        ),
        "plan-imagenet64-cond": lambda: replace(step, limit_s=3.0),
    }
    # What goes on with a run has its fault, too.
    name = step.name.removesuffix("-others")
    return faults[name]() if name in faults else step


def contained(results: GpuResults) -> dict[str, bool]:
    """Of each fault, whether a row or an outcome tells of it."""
    last = last_outcomes(results.outcomes)
    operators = read_rows(results.folder / "operators.jsonl")
    turns = [outcome for outcome in results.outcomes if outcome.step == "operators"]

    def ended(name: str, status: str, text: str = "") -> bool:
        found: StepOutcome | None = last.get(name)
        return found is not None and found.status == status and text in found.sentence

    def rows(name: str, impl: str, *statuses: str) -> bool:
        run = results.runs.get(name)
        own = [row for row in run.rows if row.axes.impl == impl] if run is not None else []
        return bool(own) and all(row.status in statuses for row in own)

    log = (results.folder / "logs" / "launches.txt").read_text()
    hot = results.runs["adm256-64"].rows
    return {
        "launch refused": "C forward" in log and "too many resources" in log,
        "NaN": ended("launches", "failed") and last["launches"].exit_code == 5,
        "illegal access in one kernel": any(
            outcome.status == "cut" and "illegal memory access" in outcome.sentence
            for outcome in turns
        ),
        "the others of that step are measured": any(
            row.impl == "eager" and row.status == "ok" for row in operators
        ),
        "hang of a step": ended("plan-imagenet64-cond", "timeout"),
        "out of memory": rows("adm256-256", "greedy", "oom", "skipped"),
        "hang of a cell": rows("adm256-128", "hanging", "timeout"),
        "throttling": any(row.conditions and row.conditions.disturbances for row in hot),
        "crash": rows("adm64-64", "segfaulting", "crashed"),
        "wrong results": rows("cifar-32", "wrong", "wrong"),
        "killed": rows("adm256-256-nhwc", "killed", "crashed", "oom"),
        "exception": rows("adm256-256-fp16", "raising", "failed"),
        "missing package": rows("adm64-64-nhwc", "unimportable", "skipped"),
        "missing sanitizer": ended("memcheck", "skipped") or ended("memcheck", "failed"),
        "none in tune: its table is read": ended("tune", "ok") and ended("operators-tuned", "ok"),
    }


def on_a_scripted_gpu(step: GpuStep) -> GpuStep:
    """The tiny step as it is on a GPU."""
    changed = {"cpu": "cuda", "gate-cpu": "gate-cuda", "impl=reference,compiled,fused": _PAIR}
    words = tuple(changed.get(word, word) for word in step.words)
    if step.name == "tune":
        words = (*words, *_TUNED)
    if step.name.startswith("operators"):
        words = (*words, "--stages", "eager,fused")
    if step.name.startswith("tests"):
        words = (*words, "--collect-only")
    if step.name in _MODELS:
        kept = words[: words.index("-a")]
        words = (*kept, *_MODELS[step.name], *words[words.index("--max-time") :])
    return replace(step, words=words)


_PAIR = "impl=reference,fused"
_MODEL = ("-a", "workload=model", "-a", "model=iddpm-cifar10-uncond", "-a", "batch=1")
_MODELS = {
    "table7-imagenet64-cond": (*_MODEL, "-a", "dtype=bf16", "-a", _PAIR, "-a", "checkpoint=none"),
}
"""What is a tiny block on a CPU, and here a model once; fp16 takes a CPU minutes."""


def main(
    output: Annotated[Path, typer.Option(metavar="DIR")],
    slices: Annotated[int, typer.Option(min=1)] = 6,
    numbers: Annotated[str | None, typer.Option("--parts", metavar="1,2,3")] = None,
    scripted: bool = False,
    fault: Annotated[str, typer.Option(metavar=f"{'|'.join(SCRIPTED_FAULTS)}")] = "",
) -> None:
    console = Console()
    stage: Stage = "cuda" if scripted else "cpu"
    change = on_a_scripted_gpu if scripted else seeded
    chosen = selected(parts("cpu"), numbers)
    known = [replace(part, steps=tuple(map(change, part.steps))) for part in chosen]
    if scripted:
        folders = [_TESTS / "support/on_a_scripted_gpu", _TESTS, os.environ.get("PYTHONPATH", "")]
        os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "SCRIPTED_GPU": fault}
    request = SliceRequest(parts=known, output=output, stage=stage, seconds=540.0)
    for _ in range(slices):
        steps.carry_out(request, console)
        if not steps.pending(known, read_outcomes(output)):
            break
    if scripted:
        draw(output, console)
        raise typer.Exit(int(bool(steps.pending(known, read_outcomes(output)))))
    raise typer.Exit(judge(known, output, console))


def draw(output: Path, console: Console) -> None:
    request = report.GpuReportRequest(output, output / "gpu.md", predict=False)
    report.carry_out(request, console, console)


def judge(known: Sequence[GpuPart], output: Path, console: Console) -> int:
    left = steps.pending(known, read_outcomes(output))
    results = read_results(output)
    draw(output, console)
    table = Table("fault", "contained")
    found = contained(results)
    for name, held in found.items():
        table.add_row(name, "yes" if held else "NO")
    console.print(table)
    console.print(f"{sum(found.values())} of {len(found)} contained, {len(left)} steps not over")
    return int(bool(left) or not all(found.values()))


if __name__ == "__main__":
    typer.run(main)
