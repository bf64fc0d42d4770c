"""The trade between speed and memory: every variant over the reference without checkpointing."""

from collections import Counter
from statistics import geometric_mean

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from resblock_bench.bench.records import variant_name

from .folder import Run
from .quantities import subject_of
from .style import GREY, MODE_MARKERS, MODE_TITLES, colour_of, finish, handle
from .table import by_site, undisturbed


def draw_front(run: Run) -> Figure | None:
    """Throughput against memory, each over that of the reference without checkpointing.

    Left the step's peak, right what the block keeps for the backward pass, which is what adds up
    over the blocks of a network. Small points are sites, large ones the geometric mean over the
    sites of a variant. None where no site has a reference without checkpointing to divide by, and
    for other steps than those of training.
    """
    points: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    missing: Counter[str] = Counter()
    sites = 0
    for site, rows in by_site(run.rows).items():
        if site.mode != "train":
            continue
        base = next((row for row in rows if variant_name(row.axes) == "reference/none"), None)
        if base is None or base.status != "ok" or base.memory is None:
            missing["without a reference"] += len(rows)
            continue
        sites += 1
        for row in rows:
            if not undisturbed(row):
                missing["disturbed"] += 1
                continue
            if row.status != "ok" or row.memory is None or row.ratio_to_none is None:
                missing["not measurable" if row.status == "ok" else row.status] += 1
                continue
            point = (
                over(row.memory.peak_above_baseline_bytes, base.memory.peak_above_baseline_bytes),
                over(row.memory.saved_for_backward_bytes, base.memory.saved_for_backward_bytes),
                row.ratio_to_none.value,
            )
            points.setdefault((row.axes.impl, row.axes.checkpoint), []).append(point)
    if len(points) < 2:
        return None
    impls = list(dict.fromkeys(row.axes.impl for row in run.rows))
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9.5, 4.6), layout="constrained")
    for side, (ax, title) in enumerate(
        zip(panels, ("peak of a training step", "kept for the backward pass"), strict=True)
    ):
        ax.set_title(f"{title}   (↖ better)")
        means: dict[str, list[tuple[float, float]]] = {}
        ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        for (impl, mode), triples in points.items():
            style = {"color": colour_of(impl, impls), "marker": MODE_MARKERS[mode]}
            xs, ys = [triple[side] for triple in triples], [triple[2] for triple in triples]
            ax.scatter(xs, ys, s=16, alpha=0.3, linewidths=0, **style)
            means.setdefault(impl, []).append((geometric_mean(xs), geometric_mean(ys)))
            ax.scatter(*means[impl][-1], s=90, edgecolors="white", zorder=4, **style)
        for impl, line in means.items():
            ax.plot(*zip(*sorted(line), strict=True), color=colour_of(impl, impls), alpha=0.5)
        ax.set_xlabel("memory, × reference (less is better)")
    panels[0].set_ylabel("throughput, × reference (more is better)")
    modes = [mode for mode in MODE_TITLES if any(key[1] == mode for key in points)]
    drawn = [impl for impl in impls if any(key[0] == impl for key in points)]
    handles = [handle(impl, colour_of(impl, impls), "o") for impl in drawn]
    handles += [handle(MODE_TITLES[mode], GREY, MODE_MARKERS[mode]) for mode in modes]
    things = "blocks" if run.rows[0].axes.workload == "block" else "models"
    note = (
        f"reference: without checkpointing; small: each of {sites} {things}; large: geometric mean"
    )
    if missing:
        note += "; not drawn: " + ", ".join(f"{n} {status}" for status, n in missing.items())
    finish(figure, run, f"Speed and memory of {subject_of(run)}", handles, note, beside=True)
    return figure


def over(value: int, base: int) -> float:
    """A ratio that can stand in a geometric mean; nothing at all counts as a byte."""
    return max(value, 1) / max(base, 1)
