"""The timing part of `check`: the gate's cells against a revision, or this machine's baseline."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from resblock_bench.bench import baseline_timing, environment
from resblock_bench.bench.compare import BaseRequest, Outcome, against_base, findings_of
from resblock_bench.bench.compare_report import summary
from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.findings import Finding
from resblock_bench.bench.machine_store import TIMING, machine_folder
from resblock_bench.bench.records import cell_name
from resblock_bench.bench.report import Checked

NAME = "timing"


@dataclass(frozen=True)
class Timed:
    """What was compared, what was found, and sentences on the whole."""

    checked: list[Checked]
    findings: list[Finding]
    notes: list[str]
    seconds: float


def cannot(base: str | None, start: Path) -> str | None:
    """Why there is nothing to compare the time with, or None."""
    if base is not None or baseline_file(start).exists():
        return None
    return (
        f"no base revision was named and {environment.machine_name()} has no baseline: add "
        "--base REV, or save one with 'resblock-bench baseline save --timing'"
    )


def baseline_file(start: Path) -> Path:
    """Where this machine's baseline is, or would be."""
    return machine_folder(environment.machine_name(), start) / TIMING


def check(request: BaseRequest | baseline_timing.Request, console: Console) -> Timed:
    """Compare. A machine that is not calibrated, or no longer as it was, allows no verdict."""
    began = time.monotonic()
    try:
        outcome = _outcome(request, console)
    except InvalidError as error:
        finding = Finding(part=NAME, level="invalid", subject=NAME, entry=None, text=str(error))
        return Timed([], [finding], [], time.monotonic() - began)
    uncalibrated = [
        Finding(part=NAME, level="inconclusive", subject=NAME, entry=None, text=note)
        for note in outcome.uncalibrated
    ]
    checked = [
        Checked(part=NAME, subject=cell_name(item.cell), entry=None) for item in outcome.items
    ]
    return Timed(
        checked,
        [*findings_of(outcome, NAME), *uncalibrated],
        [summary(outcome.items, outcome.tolerance), *outcome.notes],
        time.monotonic() - began,
    )


def _outcome(request: BaseRequest | baseline_timing.Request, console: Console) -> Outcome:
    if isinstance(request, BaseRequest):
        return against_base(request, console)
    return baseline_timing.against_baseline(request, baseline_file(request.start), console)
