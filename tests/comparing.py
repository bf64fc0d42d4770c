"""What tests of rounds and comparisons begin with: quick rules, tiny plans, the gate about them."""

from pathlib import Path

import msgspec
from cells import TINY
from rich.console import Console

from resblock_bench.bench.gate import check
from resblock_bench.bench.gate import timing as check_timing
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.lockstep.rounds import RoundRule
from resblock_bench.bench.measure.timing import DEFAULT_RULE

FAST = RoundRule(burst_s=0.0, bursts=3, seconds=0.0)
COLD = msgspec.structs.replace(DEFAULT_RULE, warmup_s=0.0, warmup_max_s=0.0, warmup_min_steps=1)


def plan_of(*changes):
    """The plan of some tiny cells on one thread."""
    cells = [PlannedCell(msgspec.structs.replace(TINY, **change), 1) for change in changes]
    return Plan(device="cpu", rule=COLD, seed=0, threads=1, memory_limit_bytes=None, cells=cells)


def checked(request):
    """What `check --timing` finds."""
    timing = check.Timing(None, lambda console: check_timing.check(request, console))
    (outcome,) = check.check(["timing"], Path("absent"), timing, Console(quiet=True))
    return outcome
