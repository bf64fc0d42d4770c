"""What a page says of a run: tables of texts with what they are sorted by, sentences, figures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import msgspec
from markupsafe import Markup

from resblock_bench.bench.errors import command, shortened
from resblock_bench.bench.measure.fingerprint import code_of_cell
from resblock_bench.bench.records import (
    Cell,
    Memory,
    Ratio,
    Row,
    cell_name,
    site_name,
    variant_name,
)
from resblock_bench.bench.runs.folder import Run
from resblock_bench.bench.runs.plots import all_figures
from resblock_bench.bench.runs.quantities import is_expected, ran_out
from resblock_bench.bench.runs.style import styled
from resblock_bench.bench.runs.table import (
    disturbed,
    headlines,
    notes_of,
    undisturbed,
    variant_line,
)
from resblock_bench.bench.terminal import visible
from resblock_bench.bench.units import (
    counted,
    format_bytes,
    format_duration,
    format_mib,
    format_ratio,
)

from .again import command_of_cell, command_of_run
from .headline import LargestBatch, Mean, Standing, largest_batches, standings
from .inline import Figures
from .predicted import PREDICTED, predicted

Grade = Literal["good", "note", "bad"]
"""Of a sentence on validity."""
MOST_TEXT = 1000
"""Characters of one text that a page shows; whole, it stands in the run folder."""
_MOST_OUTPUT = 100_000
"""Characters of what failed cells printed, all together."""
_MOST_ITEMS = 20
MOST_FIGURES = 24
_NO_NUMBER = "–"


@dataclass(frozen=True)
class Entry:
    """What stands in a table: a text, and the number that it is sorted by, if it is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Heading:
    """Of a column of numbers, or of words; `long` ones are given room."""

    text: str
    words: bool = False
    long: bool = False


@dataclass(frozen=True)
class DataTable:
    """The first column names its row."""

    headings: Sequence[Heading]
    rows: Sequence[Sequence[Entry]]


@dataclass(frozen=True)
class MissingCell:
    """A cell that has no measurement."""

    name: str
    status: str
    reason: str
    output: str
    again: str


@dataclass(frozen=True)
class ShownFigure:
    """A figure, and what it shows in words."""

    kind: str
    title: str
    text: str
    svg: Markup


@dataclass(frozen=True)
class RunContent:
    """All that a page says of a run, in the order in which it does."""

    title: str
    folder: str
    validity: Sequence[tuple[Grade, str]]
    lead: Sequence[str]
    equal_batch: DataTable | None
    equal_memory: DataTable | None
    figures: Sequence[ShownFigure]
    more_figures: bool
    wall: str | None
    cells: DataTable
    missing: Sequence[MissingCell]
    predicted: str | None
    environment: Sequence[tuple[str, str]]
    contract: Sequence[tuple[str, str]]
    again: Mapping[str, str | None]


def content_of(run: Run, figures: Figures, *, predict: bool) -> RunContent:
    """What there is to say of a run, with its predicted memory; its figures join the page's."""
    run = _presentable(run)
    rows = run.rows
    expected = predicted(rows) if predict else {}
    folder = str(run.folder)
    drawn = list(_figures(run, figures))
    return RunContent(
        title=f"{run.environment.machine}, {run.folder.resolve().name}",
        folder=folder,
        validity=validity(run),
        lead=[f"{sentence}." for sentence in headlines(rows)],
        equal_batch=_equal_batch(standings(rows)),
        equal_memory=_equal_memory(largest_batches(rows)),
        figures=drawn,
        more_figures=len(drawn) == MOST_FIGURES,
        wall=_wall(rows),
        cells=_cells(rows, expected),
        missing=_missing(rows, run.folder),
        predicted=_about_predicted(rows, expected),
        environment=_environment(run),
        contract=_facts(row.contract for row in rows),
        again={
            "report": command("report", folder),
            "plot": command("plot", folder),
            "run": command_of_run(run.plan, run.folder),
            "resume": command("run", "--resume", "--output", folder),
        },
    )


def shown(text: str) -> str:
    """Text that others wrote, as a page shows it: nothing that steers, and not too much of it."""
    text = visible(text[: 2 * MOST_TEXT])
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"


def _presentable(run: Run) -> Run:
    """The run with `shown` texts, and without samples, which a page has no use for."""
    bare = [
        msgspec.structs.replace(
            row,
            samples_ms=None,
            graph_samples_ms=None,
            rounds=None,
            output=None if row.output is None else row.output[-MOST_TEXT:],
        )
        for row in run.attempts
    ]
    attempts = [msgspec.convert(shown_texts(msgspec.to_builtins(row)), Row) for row in bare]
    return replace(run, attempts=attempts)


def shown_texts(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        found = {shown(name): shown_texts(one) for name, one in value.items()}
        if "config" in value and "emb_channels" in value:
            # A cell is named after its configuration. No page shows it, so it stays whole.
            found["config"] = value["config"]
        return found
    if isinstance(value, list | tuple):
        return [shown_texts(one) for one in value]
    return value


def validity(run: Run) -> list[tuple[Grade, str]]:
    """What to know before a number is believed, in sentences."""
    rows = run.rows
    counts: Counter[str] = Counter(row.status for row in rows)
    measured = [row for row in rows if row.status == "ok"]
    states = ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"
    text = f"{counted(len(run.plan.cells), 'cell')} planned, {len(rows)} with a row: {states}."
    whole = len(measured) == len(rows) >= len(run.plan.cells)
    said: list[tuple[Grade, str]] = [("good" if whole else "note", text)]
    if not measured:
        said.insert(
            0, ("bad", "No cell has a measurement: there is nothing to draw or to compare.")
        )
    said += [("note", note) for note in run.notes]
    said += _of_statuses(run, counts)
    said += _of_timing(measured)
    said += _of_sources(run, measured)
    return said


def _of_statuses(run: Run, counts: Mapping[str, int]) -> list[tuple[Grade, str]]:
    said: list[tuple[Grade, str]] = []
    if counts["wrong"]:
        said.append(
            ("bad", f"{counted(counts['wrong'], 'cell')} wrong: the results differ from float64 by "
             "more than their limit. No number of theirs is shown or stands in a mean.")
        )  # fmt: skip
    broken = sum(counts[status] for status in ("failed", "crashed", "timeout", "impossible"))
    if broken:
        said.append(
            ("bad", f"{counted(broken, 'cell')} failed, crashed, ran into the time limit or was "
             "faster than the machine can be; the reasons are below.")
        )  # fmt: skip
    have = {row.axes for row in run.rows}
    lacking = sum(item.cell not in have for item in run.plan.cells)
    if lacking:
        said.append(("note", f"{counted(lacking, 'planned cell')} not measured yet."))
    again = sum(row.attempt > 1 for row in run.rows)
    if again:
        said.append(("note", f"{counted(again, 'cell')} measured more than once: the last stands."))
    return said


def _of_timing(measured: Sequence[Row]) -> list[tuple[Grade, str]]:
    """Of the rows with a measurement."""
    said: list[tuple[Grade, str]] = []
    if not measured:
        return said
    shaken = disturbed(measured)
    unread = sum(row.conditions is None for row in measured)
    if shaken is not None:
        said.append(("bad", f"{shaken}. Their speeds are marked, and left out of every mean."))
    elif not unread:
        said.append(("good", "The machine did nothing else while the cells were timed."))
    if unread:
        said.append(("note", f"{counted(unread, 'cell')}: the machine's state was not read."))
    width = max(row.contract.rel_half_width for row in measured)
    precise = sum(row.stop_rule == "precision" for row in measured)
    said.append(
        ("good" if precise == len(measured) else "note",
         f"{precise} of {len(measured)} reached the precision that was asked for ({100 * width:g} %"
         " of the median and the ratio); what was not reached shows in the intervals.")
    )  # fmt: skip
    unsteady = sum(row.warmup_steady is False for row in measured)
    if unsteady:
        said.append(("note", f"{counted(unsteady, 'cell')} not steady when the warm-up ended."))
    return said


def _of_sources(run: Run, measured: Sequence[Row]) -> list[tuple[Grade, str]]:
    """Whether the numbers may stand beside each other, and whose they are."""
    said: list[tuple[Grade, str]] = []
    codes: dict[str, set[str]] = {}
    for row in measured:
        codes.setdefault(row.axes.impl, set()).add(row.code)
    for name, values in (
        ("versions of one implementation's code", max(codes.values(), key=len, default=())),
        ("contracts, which say how a cell is timed", {row.contract for row in measured}),
        ("devices", {(row.host, row.device_name, row.device_uuid) for row in measured}),
    ):
        if len(values) > 1:
            said.append(("bad", f"The rows are of {len(values)} {name}: not all compare."))
    dirty = sum(bool(row.dirty) for row in measured)
    if dirty:
        said.append(("note", f"{counted(dirty, 'cell')} measured with changes not committed."))
    ceilings = run.environment.ceilings
    if ceilings is not None and ceilings.disturbances:
        sentences = "; ".join(ceilings.disturbances[:_MOST_ITEMS])
        said.append(("note", f"Shares of the floor may be too high: {sentences}."))
    return said


def _equal_batch(found: Sequence[Standing]) -> DataTable | None:
    if not found:
        return None
    headings = [
        Heading("variant"),
        Heading("step", words=True),
        Heading("speed × reference, same mode"),
        Heading("speed × reference, none"),
        Heading("peak × reference, none"),
        Heading("kept × reference, none"),
        Heading("compared"),
    ]
    rows = []
    for line in found:
        compared = [mean.count for mean in (line.speed_to_none, line.speed) if mean is not None]
        rows.append(
            [
                Entry(f"{line.impl}, {line.checkpoint}"),
                Entry(" ".join(line.kind)),
                *map(_mean_entry, (line.speed, line.speed_to_none, line.peak, line.kept)),
                Entry(f"{max(compared, default=0)} of {line.sites}"),
            ]
        )
    return DataTable(headings, rows)


def _mean_entry(mean: Mean | None) -> Entry:
    if mean is None:
        return Entry(_NO_NUMBER)
    low, high = mean.interval or mean.reach
    ends = "–".join(map(format_ratio, (low, high)))
    words = "" if mean.interval else ", all"
    return Entry(f"{format_ratio(mean.value)} ({ends}{words})", mean.value)


def _equal_memory(found: Sequence[LargestBatch]) -> DataTable | None:
    if not found:
        return None
    headings = [
        Heading("block"),
        Heading("step", words=True),
        Heading("memory"),
        Heading("reference, none"),
        Heading("variant", words=True),
        Heading("at the same batch"),
        Heading("at its largest batch"),
        Heading("speed × reference"),
    ]
    rows = []
    for line in found:
        cell = line.base.axes
        bytes_ = "all" if line.limit is None else format_bytes(line.limit)
        rows.append(
            [
                Entry(site_name(cell)),
                Entry(f"{cell.dtype} {cell.layout} {cell.mode}"),
                Entry(bytes_, line.limit),
                _images(line.base),
                Entry(variant_name(line.best.axes)),
                _images(line.equal),
                _images(line.best),
                _ratio_entry(line.speed),
            ]
        )
    return DataTable(headings, rows)


def _images(row: Row | None) -> Entry:
    if row is None or row.throughput_images_per_s is None:
        return Entry(_NO_NUMBER)
    rate = row.throughput_images_per_s
    return Entry(f"b{row.axes.batch}: {rate:,.1f} images/s", rate)


def _ratio_entry(ratio: Ratio | None) -> Entry:
    if ratio is None:
        return Entry(_NO_NUMBER)
    text = format_ratio(ratio.value)
    if ratio.low is not None and ratio.high is not None:
        text += f" ({format_ratio(ratio.low)}–{format_ratio(ratio.high)})"
    return Entry(text, ratio.value)


_FIGURES = {
    "front": (
        "Speed against memory",
        "Every variant's throughput over its peak, and over what it keeps for the backward, both "
        "relative to the reference without checkpointing. Up and to the left is better.",
    ),
    "throughput": (
        "Throughput",
        "Images a second of every cell, with their intervals, and the ratios to the reference in "
        "the same checkpoint mode. To the right, or up, is better.",
    ),
    "memory": (
        "Peak memory",
        "The most bytes alive during a step above parameters and inputs. To the left, or down, is "
        "better.",
    ),
}
"""By the name of a figure's file: what it is, and what it shows."""


def _figures(run: Run, figures: Figures) -> Iterable[ShownFigure]:
    with styled():
        for name, figure in islice(all_figures(_drawable(run)), MOST_FIGURES):
            kind, _, part = name.partition("-")
            title, text = _FIGURES[kind]
            title += f", {part.replace('-', ', ').replace('dropout', 'dropout ')}" if part else ""
            label = f"{title}. {text} The numbers are in the table of all cells."
            yield ShownFigure(kind, title, text, figures.inline(figure, label))
        plt.close("all")


def _drawable(run: Run) -> Run:
    """The run with names for which a figure has room."""
    attempts = [
        msgspec.structs.replace(
            row,
            device_name=shortened(row.device_name),
            axes=msgspec.structs.replace(
                row.axes,
                impl=shortened(row.axes.impl),
                model=None if row.axes.model is None else shortened(row.axes.model),
            ),
        )
        for row in run.attempts
    ]
    return replace(run, attempts=attempts)


def _wall(rows: Sequence[Row]) -> str | None:
    """How many cells ran out of memory, and at which limits."""
    beyond = [row for row in rows if ran_out(row)]
    if not beyond:
        return None
    skipped = sum(map(is_expected, beyond))
    limits = sorted({row.memory_limit_bytes for row in beyond if row.memory_limit_bytes})
    text = f"{counted(len(beyond) - skipped, 'cell')} ran out of memory"
    if limits:
        ends = dict.fromkeys(map(format_bytes, (limits[0], limits[-1])))
        text += f", with a limit of {' to '.join(ends)}"
    if skipped:
        text += f"; {counted(skipped, 'larger cell')} of the same series not started"
    return text + "."


def _cells(rows: Sequence[Row], expected: Mapping[Cell, Memory]) -> DataTable:
    headings = [
        Heading("block"),
        Heading("step", words=True),
        Heading("variant", words=True),
        Heading("status", words=True),
        Heading("images/s"),
        Heading("±"),
        Heading("× reference"),
        Heading("× reference, none"),
        Heading("floor"),
        Heading("peak MiB"),
        *([Heading("predicted MiB")] if expected else []),
        Heading("kept MiB"),
        Heading("error"),
    ]
    notes = notes_of(rows)
    return DataTable(headings, [_cell_line(row, expected, notes.get(row.axes)) for row in rows])


def _cell_line(row: Row, expected: Mapping[Cell, Memory], note: str | None) -> list[Entry]:
    cell, memory, forecast = row.axes, row.memory, expected.get(row.axes)
    _, rate, half, _, floor, _, _, error = variant_line(row)
    ok = row.status == "ok"
    speed = row.throughput_images_per_s if ok else None
    line = [
        Entry(site_name(cell)),
        Entry(f"{cell.dtype} {cell.layout} {cell.mode}"),
        Entry(variant_name(cell) + (f", {note}" if note else "")),
        Entry(row.status if undisturbed(row) else f"{row.status}, disturbed"),
        Entry(_NO_NUMBER if speed is None else rate, speed),
        Entry(half or _NO_NUMBER, _half_width(row) if ok else None),
        _ratio_entry(row.ratio if ok and cell.impl != "reference" else None),
        _ratio_entry(row.ratio_to_none if ok else None),
        Entry(floor or _NO_NUMBER, row.floor.share if ok and row.floor is not None else None),
        _mib(memory.peak_above_baseline_bytes if ok and memory is not None else None),
        _mib(memory.saved_for_backward_bytes if ok and memory is not None else None),
        Entry(error, _worst_error(row)),
    ]
    if expected:
        line.insert(-2, _mib(None if forecast is None else forecast.peak_above_baseline_bytes))
    return line


def _half_width(row: Row) -> float | None:
    if row.ci_low_ms is None or row.ci_high_ms is None or row.median_ms is None:
        return None
    return (row.ci_high_ms - row.ci_low_ms) / 2 / row.median_ms


def _worst_error(row: Row) -> float | None:
    return None if row.correctness is None else row.correctness.errors[row.correctness.worst]


def _mib(count: int | None) -> Entry:
    return Entry(_NO_NUMBER) if count is None else Entry(format_mib(count), count)


def _missing(rows: Sequence[Row], folder: Path) -> list[MissingCell]:
    found, room = [], _MOST_OUTPUT
    for row in rows:
        if row.status == "ok":
            continue
        output = (row.output or "")[:room]
        room -= len(output)
        again = command_of_cell(row, folder)
        found.append(MissingCell(cell_name(row.axes), row.status, row.reason or "", output, again))
    return found


def _about_predicted(rows: Sequence[Row], expected: Mapping[Cell, Memory]) -> str | None:
    """How far the predicted peaks are from the measured ones, in a sentence."""
    known = [row for row in rows if row.status == "ok" and row.memory and row.axes in expected]
    if not known:
        return None
    off = {}
    for row in known:
        assert row.memory is not None
        ours, theirs = expected[row.axes].peak_bytes, row.memory.peak_bytes
        off[cell_name(row.axes)] = abs(ours - theirs) / max(theirs, 1)
    same = sum(difference == 0 for difference in off.values())
    text = f"The predicted peak is the measured one, to the byte, in {same} of {len(off)} cells"
    if same < len(off):
        worst = max(off, key=lambda name: off[name])
        text += f"; it is off by at most {off[worst]:.1%}, in {worst}"
    left = sum(row.status == "ok" and row.axes.impl in PREDICTED for row in rows) - len(off)
    if left:
        text += f"; {counted(left, 'cell')} not predicted"
    if any(row.code != code_of_cell(row.axes) for row in known):
        text += ". The rows were measured by other code than that which predicts"
    return text + "."


def _environment(run: Run) -> list[tuple[str, str]]:
    found = run.environment
    facts = [
        (name.replace("_", " "), _fact(name, value))
        for name, value in msgspec.to_builtins(found).items()
        if name != "ceilings" and value is not None
    ]
    if found.ceilings is not None:
        rates = found.ceilings
        facts += [
            ("copy", f"{rates.copy_bytes_per_s / 1e9:,.1f} GB/s, of any size at best "
             f"{rates.peak_bytes_per_s / 1e9:,.1f}"),
            ("matrix product", ", ".join(
                f"{dtype} {rate / 1e9:,.0f} GFLOP/s"
                for dtype, rate in list(rates.matrix_flops_per_s.items())[:_MOST_ITEMS]
            )),
        ]  # fmt: skip
    rows = run.rows
    if rows:
        facts += [
            ("code", _distinct(row.code for row in rows)),
            ("measured", " to ".join(dict.fromkeys(
                (min(row.started_at for row in rows), max(row.started_at for row in rows))
            ))),
            ("time of all cells", format_duration(sum(row.wall_s or 0.0 for row in rows))),
        ]  # fmt: skip
    return facts


def _fact(name: str, value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{key} {version}" for key, version in value.items() if version is not None]
        return ", ".join(pairs[:_MOST_ITEMS])
    if name.endswith("_bytes"):
        return format_bytes(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _facts(structs: Iterable[msgspec.Struct]) -> list[tuple[str, str]]:
    """The values of every field, those that differ beside each other."""
    found: dict[str, dict[str, None]] = {}
    for struct in dict.fromkeys(structs):
        for name in struct.__struct_fields__:
            found.setdefault(name, {})[str(getattr(struct, name))] = None
    return [(name.replace("_", " "), _distinct(values)) for name, values in found.items()]


def _distinct(values: Iterable[str]) -> str:
    texts = list(dict.fromkeys(values))
    more = f"; {len(texts) - _MOST_ITEMS} more" if len(texts) > _MOST_ITEMS else ""
    return "; ".join(texts[:_MOST_ITEMS]) + more
