"""Predicted beside measured: of the operator, of blocks, of whole models' memory.

Every prediction has a margin, and what is measured outside of it contradicts it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from rich.console import Console

from resblock_bench.bench.compiled.norms import Norm
from resblock_bench.bench.cost.gpu_figures import architecture, gpu_that_copies
from resblock_bench.bench.cost.predictions import Predicted
from resblock_bench.bench.fit.variant import VariantPlan
from resblock_bench.bench.records import Row, cell_name
from resblock_bench.bench.report.predicted import predicted
from resblock_bench.bench.terminal import say
from resblock_bench.bench.units import format_bytes

from .operators import OperatorRow
from .outcomes import last_outcomes
from .results import GpuResults

TIME_MARGIN = 1.25
"""A predicted time is a few divisions: within this factor it is taken to hold."""
BYTES_MARGIN = 1.02
RESERVED_MARGIN = 1.1
_WRONG = math.inf
"""Results that are not right contradict everything."""


class BesideOperator(NamedTuple):
    """A direction of the fused operator at a site, what else was measured there, and what was
    predicted of it; None where nothing was."""

    row: OperatorRow
    others: list[OperatorRow]
    predicted: Predicted | None


class Contradiction(NamedTuple):
    """size   the logarithm of how far apart they are"""

    sentence: str
    size: float


def predict_operators(
    rows: Sequence[OperatorRow], progress: Console | None
) -> list[BesideOperator]:
    """The fused rows with the others of their sites, heaviest first; progress None: not predicted.

    Compiles the kernels of the sites, for the architecture that was measured.
    """
    fused = [row for row in rows if row.impl == "fused"]
    fused.sort(key=lambda row: -row.weight)
    known = {} if progress is None else _predictions(fused, progress)
    return [
        BesideOperator(
            row,
            [other for other in rows if other.impl != "fused" and other.key[:-1] == row.key[:-1]],
            known.get(row.key),
        )
        for row in fused
    ]


def norm_of(row: OperatorRow) -> Norm:
    """As the operator was called: with no bias in its pre-norm add."""
    fields = {
        "batch": row.batch,
        "channels": row.channels,
        "positions": row.resolution**2,
        "groups": row.groups,
        "dtype": row.dtype,
        "layout": row.layout,
        "modulation": row.modulation,
        "bias_folded": False,
        "dropout": 0.0,
    }
    return msgspec.convert(fields, Norm)


def _predictions(
    rows: Sequence[OperatorRow], progress: Console
) -> dict[tuple[object, ...], Predicted]:
    """By key, of the rows whose GPU the model has figures of, with the copies that it reached."""
    from resblock_bench.bench.cost.costs import gather
    from resblock_bench.bench.cost.predicted_run import predictions_of
    from resblock_bench.bench.machine.workers import JobFailed

    found: dict[tuple[object, ...], Predicted] = {}
    archs = {row.key: architecture(row.device or "") for row in rows}
    for arch in sorted({arch for arch in archs.values() if arch is not None}):
        own = [row for row in rows if archs[row.key] == arch]
        norms = list(dict.fromkeys(map(norm_of, own)))
        try:
            costs, _ = gather(norms, [arch], None, progress, by_rule=True, rewrite=False)
        except JobFailed as error:  # what was measured stands
            say(progress, f"nothing is predicted of the operator: {error}")
            continue
        for copies in {row.copy_bytes_per_s for row in own}:
            known = predictions_of(costs, gpu_that_copies(arch, copies))
            found |= {
                row.key: known[norm_of(row), row.direction]
                for row in own
                if row.copy_bytes_per_s == copies
            }
    return found


def site_of_operator(row: OperatorRow) -> str:
    return (
        f"{row.channels} {row.resolution}² b{row.batch} {row.dtype} {row.layout} {row.modulation}"
    )


def contradictions(results: GpuResults, operators: Sequence[BesideOperator]) -> list[Contradiction]:
    """The largest first."""
    found = [
        *_wrong_results(results),
        *_times(operators),
        *_orders(operators),
        *_block_memory(results.rows),
        *_model_memory(results),
    ]
    return sorted(found, key=lambda one: -one.size)


def _wrong_results(results: GpuResults) -> Iterator[Contradiction]:
    """That kernels are right is a prediction, too."""
    for outcome in last_outcomes(results.outcomes).values():
        if outcome.part == 1 and outcome.status in ("failed", "timeout"):
            yield Contradiction(f"{outcome.step} {outcome.status}: {outcome.sentence}", _WRONG)
    for row in results.operators:
        if row.impl == "fused" and row.status in ("wrong", "failed"):
            text = f"{site_of_operator(row)} {row.direction} is {row.status}: {row.reason}"
            yield Contradiction(f"the fused operator, {text}", _WRONG)
        if row.impl == "fused" and row.status == "begun":
            text = "was begun and nothing came of it: it broke the GPU, hung, or its time ended"
            yield Contradiction(
                f"the fused operator, {site_of_operator(row)} {row.direction}, {text}", _WRONG
            )
    for cell in results.rows:
        if cell.axes.impl == "fused" and cell.status in ("wrong", "failed", "crashed", "timeout"):
            yield Contradiction(f"{cell_name(cell.axes)}: {cell.status}: {cell.reason}", _WRONG)


def _times(operators: Sequence[BesideOperator]) -> Iterator[Contradiction]:
    for row, _, known in operators:
        if known is None or row.median_us is None:
            continue
        ratio = row.median_us / known.us
        if not 1 / TIME_MARGIN <= ratio <= TIME_MARGIN:
            yield Contradiction(
                f"{site_of_operator(row)} {row.direction} [{row.label}], tier {row.tier}: "
                f"{row.median_us:,.1f} µs measured, {known.us:,.1f} µs predicted (by "
                f"{known.bound}): {ratio:.2f} times",
                abs(math.log(ratio)),
            )


def _orders(operators: Sequence[BesideOperator]) -> Iterator[Contradiction]:
    """Somebody predicted to be slower is faster, by more than the intervals."""
    for row, others, known in operators:
        chains = {} if known is None else {"eager": known.eager_us, "compiled": known.compiled_us}
        for other in others:
            chain = chains.get(other.impl)
            if known is None or chain is None or row.low_us is None or other.high_us is None:
                continue
            if chain > known.us and other.high_us < row.low_us:
                yield Contradiction(
                    f"{site_of_operator(row)} {row.direction} [{row.label}]: {other.impl} takes "
                    f"{other.median_us:,.1f} µs and fused {row.median_us:,.1f}, predicted "
                    f"{chain:,.1f} and {known.us:,.1f}",
                    math.log((row.median_us or 1.0) / (other.median_us or 1.0)),
                )


def _block_memory(rows: Sequence[Row]) -> Iterator[Contradiction]:
    blocks = [row for row in rows if row.axes.workload == "block"]
    expected = predicted(blocks)
    for row in blocks:
        wanted, memory = expected.get(row.axes), row.memory
        if wanted is None or memory is None or row.status != "ok":
            continue
        for name, measured, known in (
            ("peak", memory.peak_above_baseline_bytes, wanted.peak_above_baseline_bytes),
            ("kept", memory.saved_for_backward_bytes, wanted.saved_for_backward_bytes),
        ):
            yield from _apart(f"{cell_name(row.axes)}, {name}", measured, known, BYTES_MARGIN)


def _model_memory(results: GpuResults) -> Iterator[Contradiction]:
    for row, variant in planned_rows(results):
        memory = row.memory
        assert memory is not None
        name = f"{cell_name(row.axes)}, plan"
        yield from _apart(f"{name}: peak", memory.peak_bytes, variant.peak.bytes, BYTES_MARGIN)
        if memory.reserved_peak_bytes is not None and variant.reserved_bytes is not None:
            sizes = memory.reserved_peak_bytes, variant.reserved_bytes
            yield from _apart(f"{name}: reserved", *sizes, RESERVED_MARGIN)


def _apart(what: str, measured: int, known: int, margin: float) -> Iterator[Contradiction]:
    if measured <= 0 or known <= 0:
        return
    ratio = measured / known
    if not 1 / margin <= ratio <= margin:
        sizes = f"{format_bytes(measured)} measured, {format_bytes(known)} predicted"
        yield Contradiction(f"{what}: {sizes}: {ratio:.3f} times", abs(math.log(ratio)))


def planned_rows(results: GpuResults) -> Iterator[tuple[Row, VariantPlan]]:
    """Models that were measured, and planned alike."""
    for found in results.plans.values():
        for variant in found.variants:
            for row in results.rows:
                cell, recipe = row.axes, variant.recipe
                planned = variant.batch, recipe.impl, recipe.checkpoint, recipe.precision
                if (
                    row.status == "ok"
                    and row.memory is not None
                    and (cell.workload, cell.mode) == ("model", "train")
                    and (cell.model, cell.microbatch) == (found.subject.name, None)
                    and (cell.batch, cell.impl, cell.checkpoint, cell.dtype) == planned
                ):
                    yield row, variant
