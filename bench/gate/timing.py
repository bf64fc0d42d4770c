"""The timing part of `check`: the gate's cells against a revision, or this machine's baseline."""

import time
from pathlib import Path

from rich.console import Console

from resblock_bench.bench.compare import timing_baseline as baseline_timing
from resblock_bench.bench.compare.compare import BaseRequest, Outcome, against_base, findings_of
from resblock_bench.bench.compare.machine_store import TIMING, machine_folder
from resblock_bench.bench.compare.report import line, summary
from resblock_bench.bench.findings.findings import of_part
from resblock_bench.bench.findings.report import Checked
from resblock_bench.bench.machine import environment
from resblock_bench.bench.records import cell_name

from . import check as checking


def cannot(base: str | None, start: Path) -> str | None:
    """Why there is nothing to compare the time with, or None."""
    if base is not None or baseline_file(start).exists():
        return None
    return (
        f"no base revision was named and {environment.machine_name()} has no baseline: name one "
        "with 'check --base REV', or save one with 'resblock-bench baseline save --timing'"
    )


def baseline_file(start: Path) -> Path:
    """Where this machine's baseline is, or would be."""
    return machine_folder(environment.machine_name(), start) / TIMING


def check(request: BaseRequest | baseline_timing.Request, console: Console) -> checking.Outcome:
    """Compare. A machine that is not calibrated, or no longer as it was, allows no verdict."""
    began = time.monotonic()
    outcome = _outcome(request, console)
    uncalibrated = [of_part(checking.TIMING, "inconclusive", note) for note in outcome.uncalibrated]
    checked = [
        Checked(part=checking.TIMING, subject=cell_name(item.cell), entry=None)
        for item in outcome.items
    ]
    return checking.Outcome(
        checking.TIMING,
        checked,
        [*findings_of(outcome, checking.TIMING), *uncalibrated],
        time.monotonic() - began,
        [
            *(f"timing {line(item)}" for item in outcome.items),
            f"timing: {summary(outcome.items, outcome.tolerance)}",
            *outcome.notes,
        ],
        outcome.items,
    )


def _outcome(request: BaseRequest | baseline_timing.Request, console: Console) -> Outcome:
    if isinstance(request, BaseRequest):
        return against_base(request, console)
    return baseline_timing.against_baseline(request, baseline_file(request.start), console)
