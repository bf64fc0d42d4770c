"""`gpu-report`: docs/gpu.md and a page, from what `gpu-results` has left. Needs no GPU.

What contradicts a prediction comes first: a time, a saving, a peak or an order that was predicted
and is measured otherwise.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from rich.console import Console

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.checkout import checkout_around
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.markdown import escaped, table
from resblock_bench.bench.records import Row, cell_name, variant_name
from resblock_bench.bench.report.headline import standings
from resblock_bench.bench.report.page import write_page
from resblock_bench.bench.runs.table import by_site, ratio_text, undisturbed
from resblock_bench.bench.terminal import say
from resblock_bench.bench.units import counted, format_bytes, format_duration

from .beside import (
    BesideOperator,
    Contradiction,
    contradictions,
    planned_rows,
    predict_operators,
    site_of_operator,
)
from .operators import OperatorRow
from .outcomes import OVER, last_outcomes
from .parts import OPERATORS_LABEL, TABLE_7, TUNED_LABEL
from .results import GpuResults, read_results

PAGE = "report.html"
_MOST = 20
"""Contradictions that are shown."""
PUBLISHED_7 = {
    "adm-imagenet64-cond": (37.0, 74.1),
    "adm-imagenet128-cond": (11.5, 24.8),
    "adm-imagenet256-cond": (4.4, 6.4),
    "adm-upsample-64-256": (6.3, 9.5),
    "adm-upsample-128-512": (1.9, 2.3),
}
"""Images a second on a V100, naive and with fused kernels at a larger batch: ADM's table 7."""
_NOTHING = "Nothing of this has been measured yet."


@dataclass(frozen=True)
class GpuReportRequest:
    """document   the Markdown file
    predict    compile the kernels of what was measured, and predict it
    """

    folder: Path
    document: Path
    predict: bool = True


def only_folder(start: Path) -> Path:
    """The folder of results in the checkout around `start`. Raises UsageError unless it is one."""
    root = checkout_around(start) / "results" / "gpu"
    found = [path.parent for path in sorted(root.glob("*/steps.jsonl"))]
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise UsageError(f"{root} holds the results of {len(found)} machines ({names}): name one")
    return found[0]


def default_document(start: Path) -> Path:
    return checkout_around(start) / "docs" / "gpu.md"


def carry_out(request: GpuReportRequest, console: Console, progress: Console) -> int:
    """Write the document and the page; returns the exit code."""
    results = read_results(request.folder)
    operators = predict_operators(results.operators, progress if request.predict else None)
    text = "\n".join(document(results, operators)) + "\n"
    files.write(request.document, text.encode(), "name another file with --document", named=True)
    say(console, str(request.document))
    runs = [run for run in results.runs.values() if run.rows]
    if runs:
        page = write_page(runs, results.folder / PAGE, predict=request.predict)
        say(console, str(page))
    return exitcodes.OK


def document(results: GpuResults, operators: Sequence[BesideOperator]) -> Iterator[str]:
    """The lines of docs/gpu.md."""
    yield "# On a GPU"
    yield ""
    yield (
        f"What `make gpu-results` ([how](measuring.md#a-gpu-that-is-lent-for-minutes)) left in "
        f"`{results.folder.name}`, drawn by `make gpu-report`."
    )
    yield from _machines(results)
    for title, lines in (
        ("What contradicts a prediction", _contradictions(contradictions(results, operators))),
        ("The operator at published sites", _operators(operators, OPERATORS_LABEL)),
        ("The operator with tuned launches", _tuned(results.operators)),
        ("Blocks", _standings(results.rows, "block")),
        ("Whole models beside ADM's table 7", _table_7(results.rows)),
        ("Whole models", _standings(results.rows, "model")),
        ("At equal memory", _equal_memory(results.rows)),
        ("plan beside the allocator", _plans(results)),
        ("Equal code", _equal_code(results)),
        ("Every step", _steps(results)),
    ):
        yield from ("", f"## {title}", "")
        found = list(lines)
        yield from found or [_NOTHING]


def _machines(results: GpuResults) -> Iterator[str]:
    lines = []
    for found in results.machines.values():
        versions = [f"{name} {found.versions.get(name)}" for name in ("torch", "triton", "cuda")]
        commit = f"commit {found.commit[:10]}" if found.commit else "no git repository"
        commit += " with changes" if found.dirty else ""
        device = found.gpu or f"{found.cpu} (a rehearsal without a GPU)"
        text = f"{device}, driver {found.gpu_driver}, {', '.join(versions)}, {commit}"
        lines.append(f"- {escaped(text)}")
    yield from ("", *dict.fromkeys(lines), *(f"- {escaped(note)}" for note in results.notes))


def _contradictions(found: Sequence[Contradiction]) -> Iterator[str]:
    for one in found[:_MOST]:
        yield f"- {escaped(one.sentence)}"
    if len(found) > _MOST:
        yield f"- and {len(found) - _MOST} smaller ones"
    if not found:
        yield "Nothing that was measured contradicts a prediction by more than its margin."


def _operators(found: Sequence[BesideOperator], label: str) -> Iterator[str]:
    own = [item for item in found if item.row.label == label]
    if not own:
        return
    yield from _shares([item.row for item in own])
    yield ""
    headings = ("site", "direction", "eager µs", "compiled µs", "best peer µs", "fused µs")
    more = ("95 %", "of floor", "tier", "predicted µs", "measured / predicted")
    lines = []
    for item in own:
        row = item.row
        others = {other.impl: other for other in item.others}
        peers = [one for one in item.others if one.impl not in ("eager", "compiled")]
        timed = [one for one in peers if one.median_us is not None]
        best = min(timed, key=lambda one: one.median_us or 0.0, default=None)
        us = row.median_us
        predicted = None if item.predicted is None else item.predicted.us
        lines.append(
            (
                site_of_operator(row),
                row.direction,
                _us(others.get("eager")),
                _us(others.get("compiled")),
                "–" if best is None else f"{best.median_us:,.0f} {best.impl}",
                row.status if us is None else f"{us:,.0f}",
                "–" if row.low_us is None else f"{row.low_us:,.0f}–{row.high_us:,.0f}",
                "–" if row.share is None else f"{row.share:.0%}",
                row.tier or "–",
                "–" if predicted is None else f"{predicted:,.0f}",
                "–" if predicted is None or us is None else f"{us / predicted:.2f}",
            )
        )
    yield from table((*headings, *more), lines, words=2)
    yield ""
    rows = [one for item in own for one in (item.row, *item.others) if one.status != "ok"]
    problems = Counter(
        f"{row.impl} {row.status}: {row.reason or 'nothing came after it'}" for row in rows
    )
    for said, count in problems.items():
        yield f"- {escaped(said)} ({counted(count, 'row')})"


def _shares(rows: Sequence[OperatorRow]) -> Iterator[str]:
    """Of the floor, over all sites by their weight in the published models."""
    for layout in ("nchw", "nhwc"):
        for direction in ("forward", "backward"):
            own = [
                row
                for row in rows
                if (row.layout, row.direction) == (layout, direction) and row.median_us
            ]
            if own:
                # How often a site is there, for an image.
                times = [row.weight / (row.channels * row.resolution**2 * row.batch) for row in own]
                floor = sum(n * (row.floor_us or 0.0) for n, row in zip(times, own, strict=True))
                took = sum(n * (row.median_us or 0.0) for n, row in zip(times, own, strict=True))
                yield (
                    f"- {layout} {direction}: **{floor / took:.0%}** of the floor by weight, over "
                    f"{counted(len(own), 'site')}"
                )


def _us(row: OperatorRow | None) -> str:
    if row is None:
        return "–"
    return row.status if row.median_us is None else f"{row.median_us:,.0f}"


def _tuned(rows: Sequence[OperatorRow]) -> Iterator[str]:
    """What `tune` gains: the same site and direction under both labels."""
    timed = {
        (row.label, *row.key[1:]): row.median_us
        for row in rows
        if row.impl == "fused" and row.median_us is not None
    }
    for direction in ("forward", "backward"):
        ratios = []
        for row in rows:
            before = timed.get((OPERATORS_LABEL, *row.key[1:]))
            after = timed.get((TUNED_LABEL, *row.key[1:]))
            if row.label == TUNED_LABEL and row.direction == direction and before and after:
                ratios.append(before / after)
        if ratios:
            yield (
                f"- {direction}: {geometric_mean(ratios):.3f} times as fast "
                f"({min(ratios):.2f} to {max(ratios):.2f}, {counted(len(ratios), 'site')})"
            )


def _standings(rows: Sequence[Row], workload: str) -> Iterator[str]:
    own = [row for row in rows if row.axes.workload == workload]
    lines: list[tuple[str, ...]] = []
    for members in by_site(own).values():
        for row in members:
            if row.status != "ok" or row.median_ms is None:
                lines.append((cell_name(row.axes), row.status, "", "", "", ""))
                continue
            memory, calm = row.memory, undisturbed(row)
            lines.append(
                (
                    cell_name(row.axes) + ("" if calm else " !"),
                    f"{row.throughput_images_per_s:,.1f}",
                    "–" if row.ratio is None else ratio_text(row.ratio),
                    "–" if row.ratio_to_none is None else ratio_text(row.ratio_to_none),
                    "–" if memory is None else format_bytes(memory.peak_above_baseline_bytes),
                    "–" if memory is None else format_bytes(memory.saved_for_backward_bytes),
                )
            )
    if not lines:
        return
    found = standings(own)
    for one in found:
        if one.speed_to_none is not None:
            speed = f"{one.speed_to_none.value:.2f} times as fast"
            peak = "" if one.peak is None else f", with {one.peak.value:.2f} times the peak"
            kept = "" if one.kept is None else f" and {one.kept.value:.2f} times what is kept"
            kind = " ".join(one.kind)
            yield (
                f"- {kind}, {one.impl} {one.checkpoint}: {speed} as the reference without "
                f"checkpointing{peak}{kept}, over {one.speed_to_none.count} of {one.sites}"
            )
    if any(one.speed_to_none is not None for one in found):
        yield ""
    headings = ("cell", "images/s", "×ref ±", "×ref none ±", "peak", "kept")
    yield from table(headings, lines)
    if any("!" in line[0] for line in lines):
        yield ""
        yield "`!`: disturbed while it was timed; the page says by what."


def _table_7(rows: Sequence[Row]) -> Iterator[str]:
    """Images a second here beside those of a V100."""
    timed = {
        (row.axes.model, row.axes.batch, variant_name(row.axes)): row.throughput_images_per_s
        for row in rows
        if row.axes.workload == "model" and row.throughput_images_per_s is not None
    }
    lines = []
    for model, batch in TABLE_7.items():
        found = [
            timed.get((model, batch, name))
            for name in ("reference/none", "fused/none", "fused/selective")
        ]
        if any(value is not None for value in found):
            naive, fused = PUBLISHED_7[model]
            shown = ["–" if value is None else f"{value:,.1f}" for value in found]
            gain = "–" if not found[0] or not found[1] else f"{found[1] / found[0]:.2f}"
            lines.append((model, f"{batch}", f"{naive}", *shown, gain, f"{fused / naive:.2f}"))
    if lines:
        headings = ("model", "batch", "V100, naive", "reference", "fused", "fused selective")
        more = ("fused / reference", "V100: fused at its larger batch / naive")
        yield from table((*headings, *more), lines)


def _equal_memory(rows: Sequence[Row]) -> Iterator[str]:
    """The fastest batch of each variant, against the reference's, per model."""
    models: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.axes.workload == "model" and row.axes.mode == "train" and row.axes.model:
            best = models.setdefault(row.axes.model, {})
            before = best.get(variant_name(row.axes))
            if row.status == "ok" and (before is None or row.axes.batch > before.axes.batch):
                best[variant_name(row.axes)] = row
    lines = []
    for model, best in models.items():
        base = best.get("reference/none")
        for name, row in best.items():
            if base is None or not base.throughput_images_per_s or row.memory is None:
                continue
            speed = (row.throughput_images_per_s or 0.0) / base.throughput_images_per_s
            peak = format_bytes(row.memory.peak_bytes)
            images = f"{row.throughput_images_per_s:,.1f}"
            lines.append((model, name, f"{row.axes.batch}", images, f"{speed:.2f}", peak))
    if lines:
        headings = ("model", "variant", "largest batch measured", "images/s")
        yield from table((*headings, "× reference none at its largest", "peak"), lines, words=2)


def _plans(results: GpuResults) -> Iterator[str]:
    lines = []
    for row, variant in planned_rows(results):
        memory = row.memory
        assert memory is not None
        reserved, estimate = memory.reserved_peak_bytes, variant.reserved_bytes
        lines.append(
            (
                cell_name(row.axes),
                format_bytes(variant.peak.bytes),
                format_bytes(memory.peak_bytes),
                f"{memory.peak_bytes / variant.peak.bytes - 1:+.1%}",
                "–" if estimate is None else format_bytes(estimate),
                "–" if reserved is None else format_bytes(reserved),
                "–" if not estimate or reserved is None else f"{reserved / estimate - 1:+.1%}",
            )
        )
    if lines:
        headings = ("cell", "planned peak", "measured", "differs by")
        yield from table((*headings, "planned reserved", "measured", "differs by"), lines)


def _equal_code(results: GpuResults) -> Iterator[str]:
    """How often the interval of a twin's ratio misses 1, and what was calibrated."""
    twins = [row for row in results.twins if row.axes.impl == "twin" and row.status == "ok"]
    calm = [row.ratio for row in twins if undisturbed(row) and row.ratio is not None]
    ratios = [ratio for ratio in calm if ratio.low is not None]
    if ratios:
        missed = sum(not (r.low or 0.0) <= 1 <= (r.high or 0.0) for r in ratios)
        values = [ratio.value for ratio in ratios]
        yield (
            f"- of {counted(len(ratios), 'block')} of the same code under two names the 95 % "
            f"interval misses 1 in {missed}; ratios {min(values):.3f} to {max(values):.3f}"
        )
    if len(ratios) < len(twins):
        yield f"- {counted(len(twins) - len(ratios), 'block')} more: disturbed, or no interval"
    for calibration in results.calibrations:
        drift = max(noise.drift for noise in calibration.cells)
        yield (
            f"- calibrated on {calibration.device}: tolerance "
            f"{calibration.tolerance.relative:.1%}, largest drift {drift:.2%}"
        )


def _steps(results: GpuResults) -> Iterator[str]:
    last = last_outcomes(results.outcomes)
    counts = [outcome.status for outcome in last.values()]
    shown = ", ".join(f"{counts.count(name)} {name}" for name in dict.fromkeys(counts))
    took = sum(outcome.seconds for outcome in results.outcomes)
    yield f"{counted(len(last), 'step')}: {shown}; {format_duration(took)} in all."
    yield ""
    lines = []
    for outcome in last.values():
        status = outcome.status if outcome.status in OVER else f"{outcome.status}: not over"
        took_s = sum(one.seconds for one in results.outcomes if one.step == outcome.step)
        name = f"{outcome.part} {outcome.step}"
        lines.append((name, status, outcome.sentence, format_duration(took_s)))
    yield from table(("step", "outcome", "what it says", "took"), lines, words=3)
