"""Machines other than this one, as what measures a cell reads them in the cell's own process."""

import itertools
import time
from collections.abc import Callable

from resblock_bench.bench.measure.telemetry import CpuProbe, Reading


def pretend(machine: Callable[[int], Reading]) -> None:
    """Have this process's probe read a machine: its readings by number, from 0."""
    numbers = itertools.count()
    CpuProbe.read = lambda probe: machine(next(numbers))  # type: ignore[method-assign]


def quiet(number: int) -> Reading:
    """Nothing else runs there."""
    return Reading(t_s=time.monotonic())


def throttled(number: int) -> Reading:
    """Too hot, for half a second between any two readings."""
    return Reading(t_s=time.monotonic(), throttled_us={"thermal slowdown": number * 500_000})
