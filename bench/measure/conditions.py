"""What two readings of the machine say of the time between them, and what disturbed it.

Both readings belong to the same process and a warm device: the first is taken right after the
warm-up, since the clocks of an idle GPU are low for a good reason.
"""

from typing import NamedTuple

from resblock_bench.bench.records import Conditions

from .telemetry import Reading

# How far apart the SM clocks before and after may lie, relative to the higher one. Steps of one
# clock level are below 2 %.
CLOCK_SPREAD = 0.05

# A quarter of a CPU is more than what an idle machine's services take, and on two CPUs it costs a
# step an eighth. Large machines have more services: there it is a fiftieth of the threads.
LOST_CPUS = 0.25
LOST_SHARE = 0.02

# CPU times come in ticks of 10 ms, and five of them could be rounding.
LOST_LEAST_S = 0.05


class _Lost(NamedTuple):
    """CPU time that went elsewhere: seconds, and the mean number of CPUs."""

    seconds: float
    cpus: float


def conditions(
    before: Reading, after: Reading, *, source: str, images: int, threads: int
) -> Conditions:
    """Counters after minus before, gauges of both, and the disturbances that they show.

    `foreign_cpus` = (busy − own) / elapsed, `energy_j_per_image` = energy / `images`. `threads` is
    the number that the measured program computes with. A counter that went backwards counts as
    unknown and leaves a note.
    """
    notes = list(dict.fromkeys([*before.notes, *after.notes]))

    def grown(name: str, first: float | None, last: float | None) -> float | None:
        if first is None or last is None:
            return None
        if last < first:
            notes.append(f"{name} went backwards from {first:g} to {last:g}: was it reset?")
            return None
        return last - first

    throttled = None
    if before.throttled_us is not None and after.throttled_us is not None:
        throttled = {}
        for reason, first in before.throttled_us.items():
            held = grown(f"the counter of the {reason}", first, after.throttled_us.get(reason))
            if held is not None:
                throttled[reason] = int(held)
    energy = grown("the energy counter", before.energy_j, after.energy_j)

    elapsed = after.t_s - before.t_s
    busy = grown("the machine's CPU time", before.busy_cpu_s, after.busy_cpu_s)
    own = grown("the process's CPU time", before.own_cpu_s, after.own_cpu_s)
    stolen_s = grown("the stolen CPU time", before.stolen_cpu_s, after.stolen_cpu_s)
    if elapsed <= 0:
        notes.append("no time passed between the readings: CPU loads are unknown")
    foreign = _lost(None if busy is None or own is None else busy - own, elapsed)
    stolen = _lost(stolen_s, elapsed)

    sm_clock = _both(before.sm_clock_mhz, after.sm_clock_mhz)
    processes = _both(before.foreign_processes, after.foreign_processes)
    return Conditions(
        source=source,
        sm_clock_mhz=sm_clock,
        memory_clock_mhz=_both(before.memory_clock_mhz, after.memory_clock_mhz),
        temperature_c=_both(before.temperature_c, after.temperature_c),
        power_w=_both(before.power_w, after.power_w),
        energy_j=energy,
        energy_j_per_image=energy / images if energy is not None and images > 0 else None,
        throttled_us=throttled,
        foreign_processes=None if processes is None else int(max(processes)),
        cpu_mhz=_both(before.cpu_mhz, after.cpu_mhz),
        foreign_cpus=None if foreign is None else foreign.cpus,
        stolen_cpus=None if stolen is None else stolen.cpus,
        disturbances=[
            *_throttles(throttled or {}, elapsed),
            *_clocks(sm_clock),
            *_processes(processes),
            *_load("other programs took", foreign, threads),
            *_load("the hypervisor took", stolen, threads),
        ],
        notes=notes,
    )


def _both(first: float | None, last: float | None) -> tuple[float, float] | None:
    return None if first is None or last is None else (first, last)


def _lost(seconds: float | None, elapsed: float) -> _Lost | None:
    if seconds is None or elapsed <= 0:
        return None
    seconds = max(seconds, 0.0)  # below zero by rounding to ticks
    return _Lost(seconds, seconds / elapsed)


def _throttles(throttled: dict[str, int], elapsed: float) -> list[str]:
    span = f" of {elapsed:.3g} s" if elapsed > 0 else ""
    return [
        f"the {reason} held the clocks back for {held / 1e3:g} ms{span}"
        for reason, held in throttled.items()
        if held > 0
    ]


def _clocks(clocks: tuple[float, float] | None) -> list[str]:
    if clocks is None or max(clocks) == 0:
        return []
    spread = 1 - min(clocks) / max(clocks)
    if spread <= CLOCK_SPREAD:
        return []
    return [f"the SM clock went from {clocks[0]:.0f} to {clocks[1]:.0f} MHz, {spread:.0%} apart"]


def _processes(counts: tuple[float, float] | None) -> list[str]:
    most = int(max(counts or (0,)))
    return [f"{most} other process{'es' if most > 1 else ''} computed on the GPU"] if most else []


def _load(who: str, lost: _Lost | None, threads: int) -> list[str]:
    if lost is None or lost.seconds < LOST_LEAST_S:
        return []
    if lost.cpus <= max(LOST_CPUS, LOST_SHARE * threads):
        return []
    return [f"{who} {lost.cpus:.2f} CPUs beside {threads} thread{'s' if threads > 1 else ''}"]
