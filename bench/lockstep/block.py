"""Measures a block: its variants (implementation × checkpoint mode) in lockstep, a row each.

Each has a process of its own. One after the other they check their results, measure their memory
and warm up; then they take turns, a short burst of samples each. What the machine does over more
than a round thus falls on all alike, and a ratio is the median over the rounds of what two of them
took in each.
"""

import math
import random
import secrets
import time
from collections.abc import Callable, Sequence
from itertools import chain

from msgspec.structs import replace

from resblock_bench.bench.measure import stats
from resblock_bench.bench.measure.ceilings import best
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.floor import judged
from resblock_bench.bench.records import Ceilings, Cell, Ratio, Row, Rule, StopRule

from .party import Party
from .turns import Turns

Start = Callable[[Task], Party]
_FIRST_LOOK, _LOOK_AGAIN = 12, 1.5
"""The rounds after which it is first asked whether the precision is reached, and after how many
times as many it is asked again."""
_ROUNDS = 100
"""A burst is cut short so that `max_samples` are spread over so many: of two steps on a machine
that changes all the time, many short looks say more than a few long ones."""
_BETWEEN = {"cpu": 0.0075, "cuda": 0.0}
"""What processes of the same code differ by for as long as they live, `between` of a ratio. On CPUs
as measured with tests/lockstep_rates.py; on GPUs nobody has measured it."""


def measure_block(
    tasks: Sequence[Task], start: Start, ceilings_again: Callable[[Task], Ceilings | None]
) -> list[Row]:
    """The rows of a block's variants, in the order of `tasks`.

    start            begins a task's process
    ceilings_again   measures those of the machine anew: they may have been measured while others
                     worked, and are then too low

    Who waits for a turn holds memory. A variant that runs out of it beside others is tried again
    beside nothing but its reference, and then alone.
    """
    order = random.Random(tasks[0].seed)
    rows, cramped = _together(tasks, start, order)
    for task in cramped:
        peer = replace(task.cell, impl="reference")
        beside = [t for t in tasks if t.cell == peer != task.cell and rows[peer].status == "ok"]
        for group in ([*beside, task], [task]):
            found, still = _together(group, start, order)
            rows[task.cell] = found[task.cell]
            if not still:
                break
    return _judged([rows[task.cell] for task in tasks], tasks[0], ceilings_again)


def _judged(
    rows: list[Row], task: Task, ceilings_again: Callable[[Task], Ceilings | None]
) -> list[Row]:
    """The rows, held against the ceilings: `impossible` only by those that were measured twice."""
    ceilings = task.environment.ceilings
    if ceilings is None:
        return rows
    found = [judged(row, ceilings) for row in rows]
    if all(row.status == old.status for row, old in zip(found, rows, strict=True)):
        return found
    newer = ceilings_again(task)
    return found if newer is None else [judged(row, best(ceilings, newer)) for row in rows]


def _together(
    tasks: Sequence[Task], start: Start, order: random.Random
) -> tuple[dict[Cell, Row], list[Task]]:
    """The rows of some variants, and those that ran out of memory while others held some."""
    turns = Turns(order)
    beside: set[Cell] = set()
    try:
        for task in tasks:
            if turns.bursts:
                beside.add(task.cell)
            turns.open(start(task))
        take_turns(turns, tasks[0].rule)
    except BaseException:
        turns.kill()
        raise
    rows = {party.task.cell: row for party, row in turns.rows.items()}
    lacking = [t for t in tasks if rows[t.cell].status == "oom" and t.cell in beside]
    return rows, lacking


def take_turns(
    turns: Turns,
    rule: Rule,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Rounds of all that are open until the rule stops them; then all rows are there."""
    turns.read()
    stop = _rounds(turns, rule, clock, sleep)
    turns.read()
    conditions, block = turns.conditions(), secrets.token_hex(4)
    turns.finish(stop)
    right = [party for party in turns.bursts if turns.rows[party].status == "ok"]
    for party in turns.bursts:
        ratios = _ratios(party, turns, right, rule) if party in right else {}
        row, own = turns.rows[party], conditions
        if own is not None:
            images = party.task.cell.batch * sum(map(len, turns.bursts[party]))
            per_image = None if party.energy_j is None else party.energy_j / images
            own = replace(own, energy_j=party.energy_j, energy_j_per_image=per_image)
        turns.rows[party] = replace(row, block=block, conditions=own, **ratios)


def _rounds(
    turns: Turns, rule: Rule, clock: Callable[[], float], sleep: Callable[[float], object]
) -> StopRule:
    """Take rounds until the rule stops them; says what did."""
    until = clock() + rule.max_time_s * len(turns.bursts)
    look = _FIRST_LOOK
    longest = math.ceil(rule.max_samples / _ROUNDS)

    def taken(party: Party) -> int:
        return sum(map(len, turns.bursts[party]))

    while turns.bursts:
        turns.round(rule.burst_s, lambda party: min(longest, rule.max_samples - taken(party)))
        fewest = min(map(taken, turns.bursts), default=0)
        if fewest >= rule.max_samples:
            break
        if fewest >= rule.min_samples:
            if clock() >= until:
                return "time"
            # An interval that is looked at again and again is narrow by luck sooner or later.
            if min(map(len, turns.bursts.values())) >= look:
                if _precise(turns, rule):
                    return "precision"
                look = math.ceil(_LOOK_AGAIN * look)
        if len(turns.bursts) == 1 and max(map(len, chain(*turns.bursts.values()))) > 1:
            sleep(rule.gap_s)  # nobody else's turn lets the device cool down
    return "samples"


def _precise(turns: Turns, rule: Rule) -> bool:
    """Whether all medians and all ratios are known well enough."""
    for party, bursts in turns.bursts.items():
        samples = list(chain(*bursts))
        if stats.relative_half_width(samples, rule.confidence) > rule.rel_half_width:
            return False
        for ratio in _ratios(party, turns, list(turns.bursts), rule).values():
            if ratio.low is None or ratio.high is None:
                return False
            if (ratio.high - ratio.low) / 2 > rule.rel_half_width * ratio.value:
                return False
    return True


def _ratios(own: Party, turns: Turns, among: Sequence[Party], rule: Rule) -> dict[str, Ratio]:
    """To the references that are among the parties: fields of a row."""
    cell = own.task.cell
    found = {}
    for name, checkpoint in (("ratio", cell.checkpoint), ("ratio_to_none", "none")):
        peer = replace(cell, impl="reference", checkpoint=checkpoint)
        for other in among:
            if other.task.cell == peer:
                bursts = turns.bursts[other], turns.bursts[own]
                between = 0.0 if other is own else _BETWEEN[own.task.device]
                found[name] = stats.ratio_of(*bursts, rule.confidence, between)
    return found
