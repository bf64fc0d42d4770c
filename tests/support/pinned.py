"""A part of `check` whose figures a test chooses."""

from __future__ import annotations

from collections.abc import Iterable

from resblock_bench.bench.findings.findings import Finding
from resblock_bench.bench.gate.pins import Criterion, Entries, Found, PinnedPart


def part_of(
    subjects: dict[str, Entries],
    findings: Iterable[Finding] = (),
    *,
    cannot: str | None = None,
    version: str = "1.0",
    crash: BaseException | None = None,
) -> PinnedPart:
    def measure(console: object) -> Found:
        if crash is not None:
            raise crash
        return Found(dict(subjects), list(findings))

    return PinnedPart(
        name="memory",
        cannot=lambda: cannot,
        measure=measure,
        criteria={
            "bytes": Criterion("lower"),
            "error": Criterion("lower", 0.25),
            "hash": Criterion(None),
        },
        made_with=lambda: {"tool": version},
    )


def finding(level: str, subject: str = "a", entry: str | None = "x", text: str = "said") -> Finding:
    return Finding(part="memory", level=level, subject=subject, entry=entry, text=text)
