"""The timing part of `check`: the gate's cells against a revision."""

from rich.console import Console

from resblock_bench.bench.compare.compare import (
    BaseRequest,
    against_base,
    findings_of,
    line,
    summary,
)
from resblock_bench.bench.findings.findings import of_part
from resblock_bench.bench.findings.report import CheckedEntry
from resblock_bench.bench.records import cell_name

from . import check as checking


def check(request: BaseRequest, console: Console) -> checking.PartOutcome:
    """Compare. A machine that is not calibrated, or no longer as it was, allows no verdict."""
    outcome = against_base(request, console)
    uncalibrated = [of_part(checking.TIMING, "inconclusive", note) for note in outcome.uncalibrated]
    checked = [
        CheckedEntry(part=checking.TIMING, subject=cell_name(item.cell), entry=None)
        for item in outcome.items
    ]
    return checking.PartOutcome(
        checking.TIMING,
        checked,
        [*findings_of(outcome, checking.TIMING), *uncalibrated],
        [
            *(f"timing {line(item)}" for item in outcome.items),
            f"timing: {summary(outcome.items, outcome.tolerance)}",
            *outcome.notes,
        ],
        outcome.items,
    )
