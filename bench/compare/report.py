"""A comparison as a report: a row a cell, a finding for each that is not the same."""

from collections.abc import Sequence

from resblock_bench.bench.findings.findings import Finding, Level, of_part
from resblock_bench.bench.records import cell_name

from .comparison import SUSPICIOUS, Compared
from .verdict import Tolerance

COLUMNS = ("cell", "base", "head", "ratio", "95 % bounds", "verdict", "rounds", "detects")


def row(item: Compared) -> list[str]:
    """The columns: medians, their ratio with its one-sided 95 % bounds, and the smallest slowdown
    that as many rounds would have seen with 80 % probability."""
    verdict = item.verdict
    ratio = item.head / item.base if item.head and item.base else None
    bounds = "–"
    if verdict.low is not None and verdict.high is not None:
        bounds = f"{verdict.low:.3f}–{verdict.high:.3f}"
    base, head = item.counts
    return [
        cell_name(item.cell),
        _median(item.base, item.unit),
        _median(item.head, item.unit),
        "–" if ratio is None else f"{verdict.ratio or ratio:.3f}",
        bounds,
        verdict.word if item.failed is None else item.failed[0],
        f"{base}" if base == head else f"{base}/{head}",
        "–" if verdict.detectable is None else f"{verdict.detectable:.1%}",
    ]


def line(item: Compared) -> str:
    """The same in a sentence."""
    name, base, head, ratio, bounds, word, _, detects = row(item)
    return f"{name}: {base} → {head}, ratio {ratio} ({bounds}), {word}, detects {detects}"


def _median(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.4g} ms" if unit == "ms" else f"{value:.3f}×"


def findings(items: Sequence[Compared], part: str, *, sudden: bool = True) -> list[Finding]:
    """What the gate has to say; `sudden` where a great difference has to be explained."""
    found = []
    for item in items:
        judged = _finding(item, sudden)
        if judged is not None:
            level, text = judged
            name = cell_name(item.cell)
            found.append(Finding(part=part, level=level, subject=name, entry=None, text=text))
    if not items:
        found.append(of_part(part, "invalid", "no cell was compared: nothing is known"))
    return found


def _finding(item: Compared, sudden: bool) -> tuple[Level, str] | None:
    verdict = item.verdict
    if item.failed is not None:
        status, reason = item.failed
        # A base that is wrong says nothing of the head, but leaves nothing to compare it with.
        return "wrong" if status == "wrong" and not item.at_base else "invalid", reason
    because = "; ".join(verdict.reasons)
    if verdict.ratio is None or verdict.low is None or verdict.high is None:
        return "inconclusive", because
    times = f"{verdict.ratio:.3f} times base ({verdict.low:.3f}–{verdict.high:.3f})"
    if sudden and verdict.ratio * SUSPICIOUS < 1:
        return (
            "invalid",
            f"{1 / verdict.ratio:.1f}× as fast as base: find out what it no longer does",
        )
    if verdict.word == "SLOW":
        return "regression", f"{times}: {because}"
    if verdict.word == "AMBIGUOUS":
        return "inconclusive", f"{times}: {because}"
    if verdict.word == "FAST":
        return "note", f"FAST: {times}"
    return None


def explanation(items: Sequence[Compared]) -> list[str]:
    """A line a cell: which rules decided."""
    return [
        f"{cell_name(item.cell)}: {item.verdict.word}: {'; '.join(item.verdict.reasons)}"
        + (f"; {len(item.disturbed)} disturbed rounds do not count" if item.disturbed else "")
        for item in items
    ]


def summary(items: Sequence[Compared], tolerance: Tolerance) -> str:
    """Counts of the verdicts, and the tolerance they were given by."""
    words = [item.verdict.word if item.failed is None else "failed" for item in items]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    return (
        f"{len(items)} cells: {counts}; tolerance {tolerance.relative:.1%} and "
        f"{tolerance.absolute_ms * 1e3:g} µs"
    )
