"""What `cost` shows, in tables of at most 100 columns: costs, predicted times, the host's time.

Each comes with notes: what its columns mean, and what its numbers come to over the selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from resblock_bench.bench.compiled.machine_code import KernelCode, MachineCode
from resblock_bench.bench.compiled.norms import Norm

from .costs import Cost
from .host_time import HostTime, Span

WIDTH = 100
WORST = 10
"""Lines of `worst_table`."""
HOST_NOTE = (
    "host time: median of calls in turns on this CPU, autograd included. The fused call up to a "
    "driver that launches nothing; eager's on the CPU with 64 elements. Neither has the driver's "
    "own time for a launch, which each of the kernels adds on a GPU."
)
T = TypeVar("T")
_MODULATION = {"none": "", "scale_shift": ", scale and shift", "add": ", pre-norm add"}


def empty(title: str, first: str, width: int) -> Table:
    """A table whose first column, of names, is folded at a width."""
    view = Table(title=title, title_justify="left", expand=False, pad_edge=False)
    view.add_column(first, max_width=width, overflow="fold")
    return view


def _sections(view: Table, costs: Sequence[Cost]) -> Iterator[list[Cost]]:
    """Of one norm after the other, each under its name."""
    for norm, members in groupby(costs, key=lambda cost: cost.norm):
        view.add_section()
        view.add_row(Text(name_of(norm), style="bold"))
        yield list(members)


def cost_table(costs: Sequence[Cost]) -> Table:
    """Passes and sectors of each direction; registers, spills, … of its kernels.

    Numbers of several architectures are separated by "/", in the order of the heading, and stand
    once where they are equal.
    """
    archs = "/".join(str(arch) for arch in dict.fromkeys(cost.arch for cost in costs))
    view = empty(f"cost on sm_{archs}", "norm, direction, kernel", 34)
    for heading in ("passes", "sectors", "registers", "spill B", "occup.", "bits", "instr."):
        view.add_column(heading, justify="right", no_wrap=True)
    for members in _sections(view, costs):
        for _, same in groupby(members, key=lambda cost: cost.direction):
            for line in _lines(list(same)):
                view.add_row(*line)
    return view


def name_of(norm: Norm) -> str:
    """Sizes, dtype and layout, and what modulates it."""
    return (
        f"{norm.batch}×{norm.channels}×{norm.positions} {norm.dtype} {norm.layout}"
        f"{_MODULATION[norm.modulation]}{', dropout' if norm.dropout else ''}"
    )


def _lines(costs: list[Cost]) -> list[list[str]]:
    first = costs[0]
    tiers = _each(costs, lambda cost: cost.launch["tier"])
    tier = "" if first.direction == "rewrite" else f", tier {tiers}"
    lines = [
        [
            f" {first.direction}{tier}",
            _each(costs, lambda cost: f"{cost.traffic.dram + cost.traffic.small:.2f}"),
            _each(costs, lambda cost: f"{cost.traffic.sector_efficiency:.0%}"),
        ]
    ]
    # Another launch on another architecture may have other kernels.
    names = dict.fromkeys(kernel.kernel for cost in costs for kernel in cost.kernels)
    for name in names:
        kernels = [kernel for cost in costs for kernel in cost.kernels if kernel.kernel == name]
        lines.append([f"   {name}", "", "", *_kernel(kernels)])
    return lines


def _kernel(kernels: list[KernelCode]) -> list[str]:
    codes = [kernel.code for kernel in kernels]
    return [
        _each(codes, lambda code: str(code.registers)),
        _each(codes, lambda code: str(code.spill_store_bytes + code.spill_load_bytes)),
        _each(codes, lambda code: f"{code.occupancy:.0%}"),
        _each(codes, _widths),
        _each(codes, lambda code: f"{code.instructions['total']:.0f}"),
    ]


def _widths(code: MachineCode) -> str:
    """The widest access of the main loops: that to the activation."""
    load, store = max(code.main_loads, default=0), max(code.main_stores, default=0)
    return str(load) if load == store or not store else f"{load},{store}"


def _each(items: Sequence[T], text: Callable[[T], str]) -> str:
    """The text of every item, or the one they share."""
    texts = [text(item) for item in items]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def cost_notes(costs: Sequence[Cost], refused: Sequence[str]) -> list[str]:
    """What the columns mean, and what the numbers come to over the whole selection."""
    spilling = sum(kernel.code.spill_store_bytes > 0 for cost in costs for kernel in cost.kernels)
    lines = [
        "passes: over the activation, from memory, modulation and partial sums included; floor 2 "
        "forward, 3 backward, 2 rewritten. What a tier reads twice is expected from L2 (JSON has "
        "both). sectors: bytes asked for over bytes of 32-byte sectors. bits: a thread's widest "
        "global access (load,store). instr.: instructions a thread executes for an element.",
    ]
    for direction in dict.fromkeys(cost.direction for cost in costs):
        same = [cost for cost in costs if cost.direction == direction]
        passes = [cost.traffic.dram for cost in same]
        total = [cost.traffic.dram + cost.traffic.small for cost in same]
        efficiency = [cost.traffic.sector_efficiency for cost in same]
        lines.append(
            f"{direction}: {min(passes):.2f}–{max(passes):.2f} passes over activations "
            f"({min(total):.2f}–{max(total):.2f} with all else), floor {same[0].traffic.floor}; "
            f"sector efficiency from {min(efficiency):.0%}"
        )
    lines.append(f"{spilling} kernels spill registers")
    if refused:
        lines.append(f"{len(refused)} left out, the first since {refused[0]}")
    return lines


def prediction_table(costs: Sequence[Cost]) -> Table:
    """A line for each direction on each architecture: microseconds, and what bounds them."""
    view = _predictions("predicted times, no GPU was used")
    for members in _sections(view, costs):
        for cost in members:
            view.add_row(*_line(cost, f" {_direction(cost)}"))
    return view


def worst_table(costs: Sequence[Cost], weights: Mapping[Norm, int]) -> Table:
    """The directions whose time above the floor weighs most, heaviest first."""
    view = _predictions("what loses most against the floor, predicted")
    ordered = sorted(costs, key=lambda cost: _lost_us(cost, weights), reverse=True)
    for cost in ordered[:WORST]:
        view.add_row(*_line(cost, f"{name_of(cost.norm)}, {_direction(cost)}"))
    return view


def _lost_us(cost: Cost, weights: Mapping[Norm, int]) -> float:
    """Above the floor, times how often the published models run it."""
    norm = cost.norm
    count = weights.get(norm, 0) / (norm.channels * norm.positions)
    return count * (cost.predicted.us - cost.predicted.floor_us)


def _predictions(title: str) -> Table:
    view = empty(title, "norm, direction", 36)
    for heading in ("predicted µs", "floor", "eager µs", "×", "compiled µs", "×"):
        view.add_column(heading, justify="right", max_width=9, overflow="fold")
    view.add_column("bound by", no_wrap=True)
    return view


def _direction(cost: Cost) -> str:
    tier = "" if cost.direction == "rewrite" else f" {cost.launch['tier']}"
    return f"{cost.direction}{tier} sm_{cost.arch}"


def _line(cost: Cost, name: str) -> list[str]:
    found = cost.predicted
    return [
        name,
        _us(found.us),
        f"{found.floor_share:.0%}",
        _us(found.eager_us),
        f"{found.eager_us / found.us:.2f}",
        _us(found.compiled_us),
        f"{found.compiled_us / found.us:.2f}",
        f"{found.bound} {found.shares_us[found.bound] / found.us:.0%}",
    ]


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def prediction_notes(costs: Sequence[Cost], weights: Mapping[Norm, int]) -> list[str]:
    """What the columns mean; then the share of the floor, by architecture and kind of input."""
    lines = [
        "predicted: by a model of published figures, with cold caches (docs/prediction.md); no GPU "
        "has judged it yet. floor: the least passes at copy bandwidth over the predicted time. ×: "
        "eager's or torch.compile's chain, each kernel at its best, over it. bound by: what takes "
        "most of the time, and how much of it.",
    ]

    def group(cost: Cost) -> tuple[int, str, int, str]:
        return cost.arch, cost.norm.layout, cost.norm.batch, cost.direction

    for (arch, layout, batch, direction), members in groupby(sorted(costs, key=group), key=group):
        lines.append(
            f"sm_{arch} {layout} batch {batch} {direction}: {_summary(list(members), weights)}"
        )
    return lines


def _summary(costs: Sequence[Cost], weights: Mapping[Norm, int]) -> str:
    """The weighted share: time at the floor over time predicted, as the models spend it."""
    text = f"{weighted_share(costs, weights):.0%} of the floor by C·HW × count"
    large = [cost for cost in costs if cost.predicted.larger_than_l2]
    if not large:
        return f"{text}; no tensor is larger than L2"
    least = min(large, key=lambda cost: cost.predicted.floor_share)
    return (
        f"{text}; larger than L2 {weighted_share(large, weights):.0%}, worst "
        f"{name_of(least.norm)} at {least.predicted.floor_share:.0%}, bound by "
        f"{least.predicted.bound}"
    )


def weighted_share(costs: Sequence[Cost], weights: Mapping[Norm, int]) -> float:
    """Mean share of the floor, weighted by the elements that the models put there."""
    total = sum(weights[cost.norm] for cost in costs)
    return sum(weights[cost.norm] * cost.predicted.floor_share for cost in costs) / total


def host_table(times: Sequence[HostTime]) -> Table:
    """Two lines for each dtype: ours and eager's."""
    view = empty("host time of a call, no GPU was used", "scale and shift, forward + backward", 36)
    for heading in ("forward µs", "backward µs", "both µs", "kernels", "× eager"):
        view.add_column(heading, justify="right", no_wrap=True)
    for found in times:
        view.add_section()
        name = f"{'×'.join(map(str, found.shape))} {found.dtype}"
        view.add_row(f"{name}, fused", *_span(found.ours), f"{found.ratio:.2f}")
        view.add_row(f"{name}, eager", *_span(found.eager), "1")
    return view


def _span(span: Span) -> list[str]:
    times = (f"{us:.1f}" for us in (span.forward_us, span.backward_us, span.both_us))
    return [*times, f"{span.forward_kernels} + {span.backward_kernels}"]
