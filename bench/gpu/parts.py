"""What `gpu-results` measures, in order of worth, as data.

A part is a list of steps; a step is a command of a process of its own, with the time that it is
expected to take on an H100 and the longest that it may take. What a step writes lies in the output
folder:

    runs/STEP          a run folder
    operators.jsonl    the operator at published sites, a row a line; with tuned launches in
                       operators-tuned.jsonl
    tables/tuned.json  the launches that `tune` found
    plans/STEP.json    what `plan` says of a model that was measured
    calibration/       what `calibrate` stored
    logs/STEP.txt      all that it printed
    earlier/           rows that were asked for again
    machines/          the machines that outcomes name
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resblock_bench.bench.errors import UsageError

from .estimates import estimate

Words = tuple[str, ...]
Stage = Literal["cuda", "cpu"]
"""A GPU; or a CPU, where everything is tiny and interpreted, and only the way is tried."""

PROGRAM = ("{python}", "-m", "resblock_bench.bench")
OPERATORS_LABEL, TUNED_LABEL = "rules", "tuned"
"""What the operator's rows are told apart by: launches by the rules, or by the table of `tune`."""
OPERATORS = ("{python}", "-m", "resblock_bench.bench.gpu.operators")
MACHINES = "machines"
FOLDERS = ("runs", "tables", "plans", "calibration", "logs", "earlier", MACHINES)
"""Of an output folder; a run makes its own."""
TABLE_FILE = "tables/tuned.json"
TWINS = "twins"
"""The step that measures equal code."""
FAULTS = "tests/faults"
"""Has a twin of the reference, an implementation under another name with the same code."""


@dataclass(frozen=True)
class GpuStep:
    """A command of its own process.

    words     of the command; {python} is this interpreter, {output} the output folder, {tool} the
              path of `tool`
    seconds   that it is expected to take on an H100
    limit_s   that it may take, over all slices
    budget    how it takes a --time-budget, {} being seconds: it goes on where that ended it
    first_s   until something of it is on disk: not begun in less, and nothing new of it later
    heaviest  a run of its heaviest block alone; the others are left to another step
    turn_s    it is called again and again, for so long at a time, whatever a call dies of, as long
              as each adds to `rows`
    rows      the file that it appends to
    endless   it takes all the time that it is given
    run       its run folder below the output folder, "" for none
    after     the step that must be over before
    tool      a program that must be there
    tuned     with the launches that `tune` found
    keep      files below the checkout that are copied into calibration/, if it has written them
    path      a folder that its Python path begins with
    """

    name: str
    what: str
    words: Words
    seconds: float
    limit_s: float
    budget: str = ""
    first_s: float = 0.0
    heaviest: bool = False
    turn_s: float = math.inf
    rows: str = ""
    endless: bool = False
    run: str = ""
    after: str = ""
    tool: str = ""
    tuned: bool = False
    keep: str = ""
    path: str = ""

    @property
    def resumes(self) -> bool:
        return bool(self.budget)


@dataclass(frozen=True)
class GpuPart:
    number: int
    what: str
    steps: tuple[GpuStep, ...]

    @property
    def minutes(self) -> float:
        return sum(step.seconds for step in self.steps) / 60


def parts(stage: Stage) -> list[GpuPart]:
    """All parts, in order of worth, and in each the steps in order of worth."""
    return [
        GpuPart(1, "are the kernels right: tests, and compute-sanitizer", _tests(stage)),
        GpuPart(2, "the operator at published sites", (_operators(stage),)),
        GpuPart(3, "the heaviest blocks, in every checkpoint mode", _blocks(stage)),
        GpuPart(4, "tune, then the operator again", _tuning(stage)),
        GpuPart(5, "whole models at equal batch and at equal memory, plan beside", _models(stage)),
        GpuPart(6, "how far equal code lies apart: A/A, calibration", _equals(stage)),
        GpuPart(7, "more blocks: resampling, compiled, layout, dtype", _more_blocks(stage)),
    ]


def selected(
    all_parts: Sequence[GpuPart], text: str | None, option: str = "--parts"
) -> list[GpuPart]:
    """The parts of a comma list of numbers; None is all. Raises UsageError."""
    if text is None:
        return list(all_parts)
    known = {str(part.number): part for part in all_parts}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(
                f"{option} {text!r} is no list of parts: write numbers from "
                f"{min(known)} to {max(known)}, such as 1,2,3"
            )
    return [part for name, part in known.items() if name in names]


_TICKETS = "ticket"
_MANY = "test_every or test_compiles_with_inductor or test_a_captured_step"
_REST = f"not ({_TICKETS} or {_MANY})"


def _tests(stage: Stage) -> tuple[GpuStep, ...]:
    """The tests in pieces, so that an illegal access, after which a process can launch nothing
    more, takes no other piece along."""
    launches = ("{python}", "-m", "resblock_bench.bench.gpu.launches", "--device", stage)
    # Most of it compiles; each holds a context and tensors of its own.
    workers = str(min(6, os.cpu_count() or 1))
    several = ("-n", workers) if importlib.util.find_spec("xdist") else ()

    def tests(name: str, what: str, seconds: float, *options: str) -> GpuStep:
        # Warnings of other versions than the locked ones are no faults of the kernels.
        pytest = ("{python}", "-m", "pytest", "-q", "-rfEs", "--tb=short", "-W", "default")
        return GpuStep(name, what, (*pytest, "tests/gpu", *options), seconds, 5 * seconds)

    many = tests("tests-many", "every tier, every norm, compiled", 170, *several, "-k", _MANY)
    if not several:  # All norms one by one take longer than a slice; part 2 checks the heaviest.
        fewer = _MANY.replace("test_every ", "test_every_tier ")
        many = tests("tests-many", "every tier, compiled", 230, "-k", fewer)

    # An access behind a tensor is one out of bounds only where PyTorch asks for each tensor alone.
    sanitizer = (
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        "{tool}",
        "--print-limit",
        "5",
        "--error-exitcode",
        "1",
        "--tool",
    )
    few = ("--sizes", "2")
    all_or_few = launches if stage == "cuda" else (*launches, "--sizes", "1", "--dtypes", "fp32")
    return (
        GpuStep("env", "the machine as the suite sees it", (*PROGRAM, "env"), 15, 60),
        GpuStep("launches", "every kernel once, against float64", all_or_few, 80, 300),
        many,
        tests("tests-tickets", "programs that wait for each other", 50, "-k", _TICKETS),
        tests("tests-rest", "the others of tests/gpu", 35, "-k", _REST),
        GpuStep(
            "memcheck",
            "accesses out of bounds",
            (*sanitizer, "memcheck", *launches, *few),
            50,
            300,
            tool="compute-sanitizer",
        ),
        GpuStep(
            "racecheck",
            "hazards in shared memory",
            (*sanitizer, "racecheck", *launches, *few),
            50,
            300,
            tool="compute-sanitizer",
        ),
    )


_SMALLEST = (
    "{python}",
    "-c",
    "import typer; from resblock_bench.bench.gpu import operators as o; "
    "o.BATCHES = dict.fromkeys(o.BATCHES, 1); o.chosen = lambda sites, count: sites[-2:]; "
    "typer.run(o.main)",
)
"""On a CPU the smallest sites, at one image."""


def _operators(stage: Stage, label: str = OPERATORS_LABEL) -> GpuStep:
    """In turns: what breaks or hangs the GPU takes one, and the next leaves it out."""
    name = "operators" if label == OPERATORS_LABEL else f"operators-{label}"
    program = OPERATORS if stage == "cuda" else _SMALLEST
    options = ("--output", f"{{output}}/{name}.jsonl", "--device", stage, "--label", label)
    return GpuStep(
        name,
        "forward and backward, both layouts, beside eager, compiled and peers",
        (*program, *options, "--sites", "12"),
        300,
        540,
        budget="{}",
        first_s=25,
        turn_s=125,
        rows=f"{name}.jsonl",
    )


def _run(
    name: str,
    what: str,
    stage: Stage,
    *axes: str,
    folder: str = "",
    heaviest: bool = False,
    path: str = "",
    time_s: float = 1,
) -> GpuStep:
    """A `run` into a folder of its own, or of another step; on the CPU always of tiny blocks."""
    expected = estimate(axes, time_s)
    run = f"runs/{folder or name}"
    options = ["--device", stage, "--no-plots", "--output", f"{{output}}/{run}"]
    if stage == "cpu":
        kept = ("impl=", "checkpoint=", "layout=")
        axes = (*(axis for axis in axes if axis.startswith(kept)), *_TINY)
        time_s = 0.1
    else:
        options += ["--timeout", f"{math.ceil(max(240, 2 * expected.cell))}s"]
    for axis in axes:
        options += ["-a", axis]
    seconds = math.ceil(expected.first if heaviest else expected.run)
    return GpuStep(
        name,
        what,
        (*PROGRAM, "run", *options, "--max-time", f"{time_s}s"),
        seconds,
        max(400, 4 * seconds),
        budget="{}s",
        first_s=expected.first,
        heaviest=heaviest,
        run=run,
        path=path,
    )


_TINY = ("channels=32", "resolution=8", "batch=2")
_ALL = "checkpoint=none,selective,full"
_TRIO, _PAIR = "impl=reference,compiled,fused", "impl=reference,fused"


def _site(model: str, resolution: int, channels: str, batch: int) -> tuple[str, ...]:
    """Blocks of a model that keep their channels, with and without resampling."""
    return (
        f"model={model}",
        f"resolution={resolution}",
        f"channels={channels}",
        f"out_channels={channels}",
        f"batch={batch}",
    )


_ADM256, _ADM128, _ADM64 = "adm-imagenet256-cond", "adm-imagenet128-cond", "adm-imagenet64-cond"
_CIFAR = "iddpm-cifar10-uncond"


_A256, _A128 = _site(_ADM256, 256, "256", 4), _site(_ADM256, 128, "256", 8)
_A64 = _site(_ADM256, 64, "512", 8)
_B64, _B32 = _site(_ADM64, 64, "192", 32), _site(_ADM64, 32, "384", 32)
_C32, _C16 = _site(_CIFAR, 32, "128", 128), _site(_CIFAR, 16, "256", 128)
_BF16, _NHWC = "dtype=bf16", "layout=nhwc"


def _blocks(stage: Stage) -> tuple[GpuStep, ...]:
    """A block of each model: rows are written when a block is over, and each takes minutes."""

    def heaviest(name: str, what: str, *axes: str) -> GpuStep:
        return _run(name, what, stage, *axes, _BF16, _PAIR, _ALL, heaviest=True)

    return (
        heaviest("adm256-256", "256 channels at 256²", *_A256),
        heaviest("adm64-64", "192 channels at 64²", *_B64),
        heaviest("cifar-32", "128 channels at 32²", *_C32),
    )


def _more_blocks(stage: Stage) -> tuple[GpuStep, ...]:
    def others(name: str, of: str, *axes: str) -> GpuStep:
        what = f"the others of {of}, with resampling"
        return _run(name, what, stage, *axes, _BF16, _PAIR, _ALL, folder=of)

    def more(name: str, what: str, *axes: str) -> GpuStep:
        return _run(name, what, stage, *axes)

    compiled = ("impl=reference,compiled", "checkpoint=none", _BF16)
    return (
        more("adm256-256-compiled", "torch.compile at 256²", *_A256, *compiled),
        more("adm256-64", "512 channels at 64²", *_A64, _BF16, _PAIR, _ALL),
        more("adm256-256-nhwc", "channels-last", *_A256, _BF16, _NHWC, _PAIR, _ALL),
        more("adm64-64-compiled", "torch.compile at 64²", *_B64, *compiled),
        more("adm256-256-fp16", "in fp16", *_A256, "dtype=fp16", _PAIR, _ALL),
        others("adm256-256-others", "adm256-256", *_A256),
        more("adm256-128", "256 channels at 128²", *_A128, _BF16, _PAIR, _ALL),
        more("adm64-64-nhwc", "channels-last", *_B64, _BF16, _NHWC, _PAIR, _ALL),
        others("adm64-64-others", "adm64-64", *_B64),
        more("adm64-32", "384 channels at 32²", *_B32, _BF16, _PAIR, _ALL),
        more("cifar-16", "256 channels at 16²", *_C16, _BF16, _PAIR, _ALL),
        more("cifar-32-fp32", "in fp32", *_C32, "dtype=fp32", _PAIR, _ALL),
    )


def _tuning(stage: Stage) -> tuple[GpuStep, ...]:
    words = (*PROGRAM, "tune", "-a", "layout=nchw,nhwc", "--output", f"{{output}}/{TABLE_FILE}")
    tune = GpuStep(
        "tune", "launches, heaviest calls first", words, 300, 300, budget="{}s", endless=True
    )
    operators = _operators(stage, TUNED_LABEL)
    again = replace(
        operators,
        what="forward and backward with these launches, both layouts",
        words=(*operators.words, "--stages", "fused"),
        seconds=80,
        after="tune",
        tuned=True,
    )
    return (tune, again)


TABLE_7 = {_ADM64: 32, _ADM128: 4, _ADM256: 4, "adm-upsample-64-256": 4, "adm-upsample-128-512": 2}
"""Images on a V100 without fused kernels: arXiv:2105.05233, table 7."""

LARGEST = {
    _ADM256: {"reference/none": 13, "fused/none": 28, "fused/selective": 46},
    _ADM64: {"reference/none": 96, "fused/none": 139, "fused/selective": 154},
    _ADM128: {"reference/none": 52, "fused/none": 99, "fused/selective": 146},
}
"""Images at equal memory: 85 % of what `plan MODEL --dtype fp16 --ema --device-memory 78GiB` fits,
since the allocator and the context need room, too. (`plan --published` fits more, since there ADM's
attention is computed again.)"""


def _models(stage: Stage) -> tuple[GpuStep, ...]:
    def whole(name: str, what: str, *axes: str) -> GpuStep:
        return _run(name, what, stage, "workload=model", "dtype=fp16", *axes, time_s=3)

    def naive(model: str, checkpoint: str = "none") -> GpuStep:
        """A pair at a time: who waits for a turn holds memory, and four do not fit."""
        axes = (f"model={model}", f"batch={TABLE_7[model]}", _PAIR, f"checkpoint={checkpoint}")
        name = f"table7-{model.removeprefix('adm-')}"
        name += "" if checkpoint == "none" else f"-{checkpoint}"
        return whole(name, f"at table 7's batch of {TABLE_7[model]}, {checkpoint}", *axes)

    def largest(model: str) -> list[GpuStep]:
        found = []
        for variant, batch in LARGEST[model].items():
            impl, checkpoint = variant.split("/")
            axes = (f"model={model}", f"batch={batch}", f"impl={impl}", f"checkpoint={checkpoint}")
            name = f"largest-{model.removeprefix('adm-')}-{impl}-{checkpoint}"
            found.append(whole(name, f"at equal memory: {batch} images", *axes))
        return found

    def planned(model: str) -> GpuStep:
        batch = TABLE_7[model]
        name = f"plan-{model.removeprefix('adm-')}"
        words: Words = (*PROGRAM, "plan", model, "--batch", str(batch), "--dtype", "fp16", "--ema")
        words += ("--checkpoint", "none,selective", "--json", f"{{output}}/plans/{name}.json")
        return GpuStep(name, "what plan says of the same step, on the CPU", words, 45, 300)

    order = (_ADM256, _ADM64, _ADM128, "adm-upsample-64-256", "adm-upsample-128-512")
    steps = [naive(_ADM256), naive(_ADM64), *largest(_ADM256), *largest(_ADM64)]
    steps += [planned(_ADM256), planned(_ADM64)]
    steps += [naive(model) for model in order[2:]]
    steps += [naive(model, "selective") for model in order] + largest(_ADM128)
    return (*steps, planned(_ADM128))


def _equals(stage: Stage) -> tuple[GpuStep, ...]:
    twins = ("impl=reference,twin", _BF16, "batch=16")
    # A part of gate-cuda, which as a whole takes longer than a slice.
    gate = {"cuda": _site(_ADM64, 64, "192", 32), "cpu": _TINY}
    axes = (*gate[stage], _BF16, "impl=fused", "checkpoint=none")
    calibrate: Words = (*PROGRAM, "calibrate", "--rounds", "5", "--device", stage)
    for axis in axes:
        calibrate += ("-a", axis)
    return (
        _run(
            TWINS,
            "the reference beside itself under another name: how often does an interval miss 1?",
            stage,
            "channels=[64:512:x2]",
            "resolution=[16:64:x2]",
            *twins,
            path=FAULTS,
        ),
        GpuStep(
            "calibrate",
            "two processes of equal code, the tolerance of verdicts",
            calibrate,
            330,
            500,
            keep="results/baselines/*/calibration-*.json",
        ),
    )
