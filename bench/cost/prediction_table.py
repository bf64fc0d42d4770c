"""Predicted times as a table of at most 100 columns, and what they come to over a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from resblock_bench.bench.compiled.norms import Norm

from .costs import Cost
from .table import name_of

WORST = 10
"""Lines of `worst`."""


def table(costs: Sequence[Cost]) -> Table:
    """A line for each direction on each architecture: microseconds, and what bounds them."""
    view = _empty("predicted times, no GPU was used")
    for norm, members in groupby(costs, key=lambda cost: cost.norm):
        view.add_section()
        view.add_row(Text(name_of(norm), style="bold"))
        for cost in members:
            view.add_row(*_line(cost, f" {_direction(cost)}"))
    return view


def worst(costs: Sequence[Cost], weights: Mapping[Norm, int]) -> Table:
    """The directions whose time above the floor weighs most, heaviest first."""
    view = _empty("what loses most against the floor, predicted")
    ordered = sorted(costs, key=lambda cost: _lost_us(cost, weights), reverse=True)
    for cost in ordered[:WORST]:
        view.add_row(*_line(cost, f"{name_of(cost.norm)}, {_direction(cost)}"))
    return view


def _lost_us(cost: Cost, weights: Mapping[Norm, int]) -> float:
    """Above the floor, times how often the published models run it."""
    norm = cost.norm
    count = weights.get(norm, 0) / (norm.channels * norm.positions)
    return count * (cost.predicted.us - cost.predicted.floor_us)


def _empty(title: str) -> Table:
    view = Table(title=title, title_justify="left", expand=False, pad_edge=False)
    view.add_column("norm, direction", max_width=36, overflow="fold")
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


def notes(costs: Sequence[Cost], weights: Mapping[Norm, int]) -> list[str]:
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
