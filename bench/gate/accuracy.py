"""The accuracy part of `check`: errors against float64 of every path of the operator.

A subject is a path: the tiers A to D of the Triton kernels, in Triton's interpreter, and "aten",
PyTorch's own kernels on the CPU. An entry is a case of `accuracy_cases`; of each of its results it
has the relative error, and that over eager PyTorch's on the same inputs.

The interpreter truncates what is stored in bfloat16, where a GPU rounds to nearest, so the tiers
are taken in float32 and float16. Dropout is left out: its masks are not those of eager PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from resblock_bench.bench.checkout import in_checkout
from resblock_bench.bench.findings.findings import Finding, Level
from resblock_bench.bench.machine.answers import answers
from resblock_bench.bench.machine.workers import Job, JobFailed
from resblock_bench.bench.records import Conditioning, DType, Layout
from resblock_bench.kernels.dispatch import triton_installed
from resblock_bench.kernels.tiers import TIERS

from .accuracy_cases import RESULTS, AccuracyCase, Errors, measure
from .pins import Criterion, Found, PinnedPart, Value

NAME = "accuracy"
TOLERANCE = 0.25
# PyTorch has its loops for several instruction sets, which draw and add differently: between two of
# them errors differed up to twofold. These are the loops that every CPU has, on one thread, since
# threads divide sums as well.
_SAME_EVERYWHERE = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}

_SIZES = {"A": (2, 8), "B": (2, 12), "C": (2, 16), "D": (1, 20)}
"""Samples and size for each tier: even tiles and ragged ones, one split of a unit and several."""


def cases() -> Iterator[AccuracyCase]:
    """All cases, in order."""
    inputs: tuple[tuple[DType, float], ...] = (
        ("fp32", 0.0),
        ("fp32", 100.0),
        ("fp32", 1000.0),
        ("fp16", 0.0),
        ("bf16", 0.0),
    )
    layouts: tuple[Layout, ...] = ("nchw", "nhwc")
    conditionings: tuple[Conditioning, ...] = ("scale_shift", "add")
    for (dtype, mean), layout, how in itertools.product(inputs, layouts, conditionings):
        yield AccuracyCase(None, dtype, layout, how, mean, 8, 16)
    for tier in TIERS.values():
        samples, size = _SIZES[tier]
        yield AccuracyCase(tier, "fp32", "nhwc", "scale_shift", 0.0, samples, size)
        yield AccuracyCase(tier, "fp32", "nchw", "scale_shift", 1000.0, samples, size)
        yield AccuracyCase(tier, "fp32", "nhwc", "add", 100.0, samples, size)
        yield AccuracyCase(tier, "fp16", "nchw", "add", 0.0, samples, size)


def measure_cases(wanted: Sequence[AccuracyCase], console: Console) -> Found:
    """The figures of the cases, measured in processes of their own."""
    found = Found()
    jobs = [Job(True, measure, (case,)) for case in wanted]
    values = dict(answers(jobs, console, "errors against float64", _SAME_EVERYWHERE))
    # Entries stand in the order of the cases, in which they do not end.
    for case, job in zip(wanted, jobs, strict=True):
        try:
            enter(found, case, values[job].get())
        except JobFailed as error:
            _say(found, "invalid", case, f"crashed: {error}")
    return found


def enter(found: Found, case: AccuracyCase, errors: Errors) -> None:
    """Add a case's figures, and a finding where a result is wrong whatever is pinned."""
    figures: dict[str, Value] = {}
    for name, error in errors.ours.items():
        eager = errors.eager[name]
        figures[f"{name} error"] = _rounded(error)
        figures[f"{name} / eager"] = _rounded(error / eager if eager else math.nan)
    found.subjects.setdefault(subject_of(case), {})[case.name] = figures
    wrong = [
        f"{name} is {error:.3g} from float64, and {errors.limits[name]:.3g} is allowed"
        for name, error in errors.ours.items()
        if error > errors.limits[name]
    ]
    if wrong:
        _say(found, "wrong", case, "; ".join(wrong))


def _rounded(value: float) -> float | None:
    """To three digits, which are more than repeat on another CPU."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _say(found: Found, level: Level, case: AccuracyCase, text: str) -> None:
    found.findings.append(Finding(NAME, level, subject_of(case), case.name, text))


def subject_of(case: AccuracyCase) -> str:
    """The path that a case takes."""
    return "aten" if case.tier is None else f"triton-{case.tier}"


def _cannot() -> str | None:
    if not in_checkout(Path.cwd()):
        return "it is about this project's kernels: run it in a checkout of resblock-bench"
    return None if triton_installed() else "Triton, whose interpreter it needs, is not installed"


def _made_with() -> dict[str, str | None]:
    """Figures are ratios to PyTorch's own kernels, and those of the tiers are interpreted."""
    import triton

    minor = ".".join(torch.__version__.split(".")[:2])
    return {"torch": minor, "triton": triton.__version__}


_CRITERION = Criterion("lower", tolerance=TOLERANCE)

PART = PinnedPart(
    name=NAME,
    cannot=_cannot,
    measure=lambda console: measure_cases(list(cases()), console),
    criteria={f"{name}{of}": _CRITERION for name in RESULTS for of in (" error", " / eager")},
    made_with=_made_with,
)
