"""What `plan` shows: the memory of each variant, its largest batches, and the cheapest change."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from resblock_bench.bench.units import format_bytes, format_mib

from .equal_memory import EqualMemoryTable
from .lifetimes import Purpose
from .peaks import MOST_IMAGES
from .plans import GIB, Change, MemoryPlan, PlanRequest, variant_title
from .training import Recipe, autocast_dtype
from .variant import VariantPlan

_RESIDENT: dict[Purpose, str] = {
    "parameters": "parameters",
    "masters": "float32 masters",
    "optimizer": "AdamW",
    "ema": "moving average",
    "inputs": "inputs",
}
_MOST_PLACES = 3
NOTE = (
    "Bytes of tensors, computed on fake tensors and not measured: what a GPU's libraries, its "
    "allocator's cache and fragmentation take comes on top."
)


def shown(found: MemoryPlan, request: PlanRequest) -> Iterator[Table | str]:
    """What is said of a plan, in order: tables and lines."""
    yield title(found, request)
    if found.variants:
        yield _memory(found)
        yield _always(found.variants[0])
        yield from _reserved(found.variants)
        yield from (_at_the_peak(plan) for plan in found.variants)
        for plan in found.variants:
            if plan.note is not None:
                yield f"{variant_title(plan.recipe)}: {plan.note}"
    for failure in found.failures:
        yield f"{variant_title(failure.recipe)}: {failure.problem}"
    for change in found.changes:
        yield sentence(found, change)
    if found.variants:
        yield NOTE
    if found.interrupted:
        yield "interrupted: this is what there is so far"


def title(found: MemoryPlan, request: PlanRequest) -> str:
    """What is planned, in a line."""
    parts = [f"{found.subject.name}: a training step of {found.batch} images"]
    if found.images_a_pass < found.batch:
        parts.append(f"{found.images_a_pass} at a time")
    parts.append(precision_words(found, request.recipe("reference", "none")))
    parts.append("AdamW" if request.optimizer == "adamw" else "no optimizer")
    if request.recompute_attention:
        parts.append("attention computed again")
    if request.ema:
        parts.append("moving average")
    return ", ".join(parts)


def precision_words(found: MemoryPlan, recipe: Recipe) -> str:
    if recipe.precision == "fp32":
        return "fp32"
    if autocast_dtype(found.subject, recipe.precision) is not None:
        return f"autocast to {recipe.precision}"
    return f"{recipe.precision} with float32 masters" if recipe.optimizer != "none" else "fp16"


def _memory(found: MemoryPlan) -> Table:
    title = "MiB at the peak, and the largest batch for a device"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    for heading in ("peak", "gradients", "activations", "temporaries"):
        table.add_column(heading, justify="right", no_wrap=True)
    for capacity in found.devices:
        table.add_column(capacity_name(capacity), justify="right", no_wrap=True)
    most = max(found.devices)
    for plan in found.variants:
        kinds = (plan.peak.kinds.get(k, 0) for k in ("gradients", "activations", "temporaries"))
        table.add_row(
            Text(variant_title(plan.recipe)),
            format_mib(plan.peak.bytes),
            *(format_mib(count) if count else "–" for count in kinds),
            *(batch_words(plan.largest_batch(capacity)) for capacity in found.devices),
            style="" if plan.peak.bytes <= most else "yellow",
        )
    return table


def capacity_name(capacity: int) -> str:
    return f"{capacity // GIB} GiB" if capacity % GIB == 0 else format_bytes(capacity)


def batch_words(images: int) -> str:
    return f"≥{images:,}" if images == MOST_IMAGES else f"{images:,}" if images else "–"


def _always(plan: VariantPlan) -> str:
    """What lives between steps is the same in all variants."""
    parts = [
        f"{name} {format_bytes(plan.peak.kinds[kind])}"
        for kind, name in _RESIDENT.items()
        if plan.peak.kinds.get(kind)
    ]
    return f"in every peak: {', '.join(parts)}"


def _reserved(plans: Sequence[VariantPlan]) -> Iterator[str]:
    """What the allocator would hold at the batch asked for."""
    parts = [
        f"{variant_title(plan.recipe)} {format_bytes(plan.reserved_bytes)}"
        for plan in plans
        if plan.reserved_bytes is not None
    ]
    if parts:
        yield (
            "what CUDA's caching allocator would reserve, an estimate that is not confirmed on a "
            f"GPU: {', '.join(parts)}"
        )


def _at_the_peak(plan: VariantPlan) -> str:
    peak = plan.peak
    where = f" of {peak.place}" if peak.place and peak.phase in ("forward", "backward") else ""
    held = [
        f"{place or 'the model itself'} {format_bytes(count)}"
        for place, count in list(peak.places.items())[:_MOST_PLACES]
    ]
    text = f"{variant_title(plan.recipe)} has its peak in the {peak.phase}{where}"
    return f"{text}; most is held by {', '.join(held)}" if held else text


def sentence(found: MemoryPlan, change: Change) -> str:
    """What makes the batch fit into a device."""
    device = capacity_name(change.device_bytes)
    if change.what is None or change.peak_bytes is None:
        return (
            f"{device}: {found.images_a_pass} images do not fit, and no change here makes them fit"
        )
    needs = format_bytes(change.peak_bytes)
    if not change.what:
        return f"{device}: fits as it is, with {needs}"
    return f"{device}: the cheapest change is {change.what}, with {needs}"


def shown_equal_memory(found: EqualMemoryTable) -> Iterator[Table | str]:
    """One line a variant: its largest batches."""
    title = "largest batch of a training step, as published"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("model, variant", no_wrap=True)
    for capacity in found.devices:
        table.add_column(capacity_name(capacity), justify="right", no_wrap=True)
    before = ""
    for row in found.rows:
        if row.model != before:
            table.add_row(f"{row.model} {row.plan.recipe.precision}", style="bold")
            before = row.model
        table.add_row(f"  {variant_title(row.plan.recipe)}", *map(batch_words, row.largest))
    yield table
    yield from (f"{name}: {problem}" for name, problem in found.problems.items())
    yield NOTE
