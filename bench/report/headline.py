"""How variants stand to the reference: at equal batch, and at equal memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from msgspec.structs import replace

from resblock_bench.bench.records import Cell, Memory, Ratio, Row, site_of, variant_name
from resblock_bench.bench.runs.front import over
from resblock_bench.bench.runs.quantities import ran_out
from resblock_bench.bench.runs.table import PLURALS, by_site, mean_interval, undisturbed

BASE = "reference/none"
"""The variant that everything is compared with: no kernel, no checkpointing."""


@dataclass(frozen=True)
class Mean:
    """The geometric mean of some ratios, with the interval that follows from theirs."""

    value: float
    interval: tuple[float, float] | None
    reach: tuple[float, float]
    count: int


@dataclass(frozen=True)
class Standing:
    """How a variant stands to the reference in blocks, or models, of one mode, dtype and layout.

    speed            over the reference in the same checkpoint mode
    speed_to_none    over the reference without checkpointing, as are `peak` and `kept`
    sites            in which it was to be measured; a mean says how many it is of
    """

    kind: tuple[str, ...]
    impl: str
    checkpoint: str
    speed: Mean | None
    speed_to_none: Mean | None
    peak: Mean | None
    kept: Mean | None
    sites: int


def standings(rows: Iterable[Row]) -> list[Standing]:
    """At equal batch: a line a variant, over the blocks in which both were measured.

    A speed that was measured while the machine was disturbed is left out; bytes are not disturbed.
    """
    groups: dict[tuple[tuple[str, ...], str, str], list[tuple[Row, Memory | None]]] = {}
    for site, members in by_site(rows).items():
        base = next((row for row in members if variant_name(row.axes) == BASE), None)
        memory = base.memory if base is not None and base.status == "ok" else None
        for row in members:
            whole = () if site.workload == "block" else (PLURALS[site.workload],)
            kind = *whole, site.mode, site.dtype, site.layout
            key = kind, row.axes.impl, row.axes.checkpoint
            groups.setdefault(key, []).append((row, memory))
    found = []
    for (kind, impl, checkpoint), pairs in groups.items():
        if f"{impl}/{checkpoint}" == BASE:
            continue
        calm = [row for row, _ in pairs if row.status == "ok" and undisturbed(row)]
        found.append(
            Standing(
                kind,
                impl,
                checkpoint,
                speed=None if impl == "reference" else _mean(row.ratio for row in calm),
                speed_to_none=_mean(row.ratio_to_none for row in calm),
                peak=_of_bytes(pairs, lambda memory: memory.peak_above_baseline_bytes),
                kept=_of_bytes(pairs, lambda memory: memory.saved_for_backward_bytes)
                if "inference" not in kind
                else None,
                sites=len(pairs),
            )
        )
    return found


def _mean(found: Iterable[Ratio | None]) -> Mean | None:
    ratios = [ratio for ratio in found if ratio is not None]
    if not ratios:
        return None
    values = [ratio.value for ratio in ratios]
    reach = min(values), max(values)
    return Mean(geometric_mean(values), mean_interval(ratios), reach, len(values))


def _of_bytes(
    pairs: Sequence[tuple[Row, Memory | None]], bytes_of: Callable[[Memory], int]
) -> Mean | None:
    values = [
        over(bytes_of(row.memory), bytes_of(base))
        for row, base in pairs
        if row.status == "ok" and row.memory is not None and base is not None
    ]
    if not values:
        return None
    return Mean(geometric_mean(values), None, (min(values), max(values)), len(values))


@dataclass(frozen=True)
class LargestBatch:
    """What a variant reaches in the memory that the reference needs, or has.

    base     the reference without checkpointing at the largest of its batches that counts
    limit    the bytes both may allocate: the wall that the reference ran into, or else its own peak
    equal    the variant at the same batch, if it was measured there
    best     the variant at its largest batch within the limit
    speed    the images a second of `best` over those of `base`, with the least and the most that
             the intervals of both medians allow: they did not take turns
    """

    base: Row
    limit: int | None
    equal: Row | None
    best: Row
    speed: Ratio


def largest_batches(rows: Iterable[Row]) -> list[LargestBatch]:
    """At equal memory: of every block that was measured with several batches, a line a variant.

    Only where some variant fits a larger batch than the reference does.
    """
    series: dict[Cell, list[Row]] = {}
    for row in rows:
        series.setdefault(replace(site_of(row.axes), batch=1), []).append(row)
    return [line for members in series.values() for line in _of_series(members)]


def _of_series(members: Sequence[Row]) -> list[LargestBatch]:
    usable = [
        row
        for row in members
        if row.status == "ok" and row.memory is not None and row.median_ms and undisturbed(row)
    ]
    bases = [row for row in usable if variant_name(row.axes) == BASE]
    others: dict[str, list[Row]] = {}
    for row in usable:
        if variant_name(row.axes) != BASE:
            others.setdefault(variant_name(row.axes), []).append(row)
    wall = [row for row in members if variant_name(row.axes) == BASE and ran_out(row)]
    for base in sorted(bases, key=_batch, reverse=True):
        limit = wall[0].memory_limit_bytes if wall else _peak(base)
        fitting = {
            name: [row for row in own if wall or _peak(row) <= _peak(base)]
            for name, own in others.items()
        }
        best = [max(own, key=_batch) for own in fitting.values() if own]
        if any(_batch(row) > _batch(base) for row in best):
            return [_line(base, limit, others[variant_name(row.axes)], row) for row in best]
        if wall:  # nothing fits more than the reference's largest batch
            break
    return []


def _line(base: Row, limit: int | None, own: Sequence[Row], best: Row) -> LargestBatch:
    equal = next((row for row in own if _batch(row) == _batch(base)), None)
    return LargestBatch(base, limit, equal, best, _speed(best, base))


def _speed(row: Row, base: Row) -> Ratio:
    images = _batch(row) / _batch(base)
    assert row.median_ms and base.median_ms
    ends = (row.ci_low_ms, row.ci_high_ms, base.ci_low_ms, base.ci_high_ms)
    low = high = None
    if None not in ends:
        own_low, own_high, base_low, base_high = (end or 0.0 for end in ends)
        low, high = images * base_low / own_high, images * base_high / own_low
    return Ratio(value=images * base.median_ms / row.median_ms, low=low, high=high)


def _batch(row: Row) -> int:
    return row.axes.batch


def _peak(row: Row) -> int:
    return row.memory.peak_bytes if row.memory is not None else 0
