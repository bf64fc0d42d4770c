"""What tests of rounds and comparisons begin with: quick rules, tiny plans, the gate about them."""

import functools
import math

import msgspec
from rich.console import Console

from resblock_bench.bench.gate import check
from resblock_bench.bench.gate import timing as check_timing
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.lockstep.rounds import Round, RoundRule
from resblock_bench.bench.measure.timing import DEFAULT_RULE

from .cells import TINY

FAST = RoundRule(burst_s=0.0, bursts=3, seconds=0.0)
COLD = msgspec.structs.replace(DEFAULT_RULE, warmup_s=0.0, warmup_max_s=0.0, warmup_min_steps=1)
UNDISTURBED = """
import pretended as _pretended

_pretended.pretend(_pretended.quiet)
"""
"""Appended to a side's own code: its rounds count, whatever else runs on this machine."""


def a_round(ratio=1.0, base_ms=10.0, **changes):
    """A round of few samples on a quiet machine."""
    taken = Round(
        base_ms=base_ms,
        head_ms=base_ms * ratio,
        log_ratio=math.log(ratio),
        base_samples=3,
        head_samples=3,
        disturbances=[],
        notes=[],
    )
    return msgspec.structs.replace(taken, **changes)


def plan_of(*changes):
    """The plan of some tiny cells on one thread."""
    cells = [PlannedCell(msgspec.structs.replace(TINY, **change), 1) for change in changes]
    return Plan(device="cpu", rule=COLD, seed=0, threads=1, memory_limit_bytes=None, cells=cells)


def checked(request):
    """What `check --timing` finds."""
    timing = functools.partial(check_timing.check, request, Console(quiet=True))
    (outcome,) = check.check(["timing"], {"timing": timing})
    return outcome
