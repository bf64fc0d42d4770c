"""What `tune` shows: a line a bucket, the table of buckets, what was refused and why."""

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table as Grid

from resblock_bench.bench.runs import table
from resblock_bench.bench.terminal import say

from .bucket import BucketOutcome
from .choices import bucket_name, choice_name


def results_table(outcomes: Iterable[BucketOutcome]) -> Grid:
    """A line for each bucket, of at most 100 columns."""
    grid = Grid(
        expand=False,
        pad_edge=False,
        caption="bucket: C/G × positions × groups. launch: tier, tile, warps w, waves ×, tiles t",
        caption_justify="left",
    )
    grid.add_column("bucket", max_width=38, overflow="fold")
    for heading in ("rules µs", "best µs", "gain"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("launch", max_width=26, overflow="fold")
    for outcome in outcomes:
        name, entry = bucket_name(outcome.work.bucket), outcome.entry
        if entry is None:
            style = "bold red" if outcome.rules_are_wrong else "dim"
            grid.add_row(name, "–", "–", "–", _lack(outcome), style=style)
        elif entry.choice == outcome.rules:
            grid.add_row(name, f"{entry.rules_us:,.1f}", "", "", "the rules'")
        else:
            times = f"{entry.rules_us:,.1f}", f"{entry.time_us:,.1f}"
            grid.add_row(name, *times, f"{outcome.gain:.0%}", choice_name(entry.choice))
    return grid


def _lack(outcome: BucketOutcome) -> str:
    """Why there is no entry, in a word or two."""
    if outcome.rules_are_wrong:
        return "the rules' is WRONG"
    return "out of time" if outcome.problem is None else "not measured"


def refusals(outcomes: Iterable[BucketOutcome]) -> list[str]:
    """Wrong launches one by one; then problems; then what did not launch, counted by reason."""
    wrong, problems = [], []
    counted: Counter[str] = Counter()
    for outcome in outcomes:
        name = bucket_name(outcome.work.bucket)
        if outcome.problem is not None:
            problems.append(f"not measured: {name}: {outcome.problem}")
        for refusal in outcome.refused:
            if refusal.wrong:
                whose = " (the rules')" if refusal.choice == outcome.rules else ""
                choice = choice_name(refusal.choice)
                wrong.append(f"WRONG: {name}: {choice}{whose}: {refusal.reason}")
            else:
                counted[refusal.reason] += 1
    return [
        *wrong,
        *problems,
        *(f"refused: {count} launch{'es' * (count > 1)}: {reason}" for reason, count in
          counted.most_common()),
    ]  # fmt: skip


def summary(outcomes: Sequence[BucketOutcome], planned: int) -> str:
    """How many buckets were measured, and by how much the rules were beaten."""
    measured = [outcome for outcome in outcomes if outcome.entry is not None]
    gains = [o.gain for o in measured if o.entry is not None and o.entry.choice != o.rules]
    text = f"{len(measured)} of {planned} buckets: the rules are as good in "
    text += f"{len(measured) - len(gains)}"
    if gains:
        text += f" and beaten in {len(gains)}, by {min(gains):.0%} to {max(gains):.0%}"
    return text + "."


def show(console: Console, outcomes: Sequence[BucketOutcome], planned: int) -> None:
    if outcomes:
        console.print(results_table(outcomes), width=min(console.width, table.WIDTH))
    for line in refusals(outcomes):
        say(console, line)
    say(console, summary(outcomes, planned))


def finished(outcome: BucketOutcome) -> str:
    """What came of a bucket, in a line."""
    entry = outcome.entry
    if entry is None:
        found = outcome.problem or "out of time"
    elif entry.choice == outcome.rules:
        found = f"the rules' {choice_name(entry.choice)}, {entry.time_us:,.1f} µs"
    else:
        found = (
            f"{choice_name(entry.choice)}, {entry.time_us:,.1f} µs; "
            f"the rules' takes {entry.rules_us:,.1f} µs"
        )
    return (
        f"{bucket_name(outcome.work.bucket)}: {found}; "
        f"{outcome.tried} of {outcome.planned} launches tried, {len(outcome.refused)} refused"
    )
