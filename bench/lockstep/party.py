"""A variant's process as seen by who gives the turns: opened, asked for bursts, ended."""

import time
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.machine.process import Process, Processes
from resblock_bench.bench.measure import orders
from resblock_bench.bench.measure.cell import CellJob, row_of
from resblock_bench.bench.measure.jobs import measure_cell
from resblock_bench.bench.records import Row, StopRule

CLOCK_FACTOR, CLOCK_MS = 3.0, 2.0
"""What a step may take from outside, without what its process waited for a CPU: so many times what
it says, and so much more for the work around it. In one burst at least."""
A = TypeVar("A", orders.Ready, orders.Samples, orders.Counters, orders.Energy)


class Ended(Exception):
    """A party that takes no more turns; its row says why."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.reason)
        self.row = row


class Party:
    """A cell's process. Only one of those on a device computes at a time: who opens or asks waits.

    limit_s       what it may take in all, seconds; the turns of others do not count
    environment   variables of the process

    `open` comes first, `finish` last; each raises Ended where the process comes to its end before.
    `energy_j` is what the device took in its bursts, None where it does not say.
    """

    def __init__(
        self,
        processes: Processes,
        job: CellJob,
        *,
        limit_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.task = job.task
        self._limit_s = limit_s
        self._used_s = 0.0
        # Of the burst in which the two clocks agree best: how far beyond, said, seen.
        self._closest: tuple[float, float, float] | None = None
        self.energy_j: float | None = 0.0
        began = time.monotonic()
        argument = msgspec.json.encode(job)
        self._process: Process = processes.start(measure_cell, argument, environment=environment)
        self._used_s += time.monotonic() - began

    def open(self) -> None:
        """Wait until it is checked, its memory measured, and warm."""
        self._answer(orders.Ready)

    def burst(self, seconds: float, most: int | None = None) -> list[float]:
        """Samples in milliseconds, of inputs not seen before."""
        self._ask(orders.Redraw(), orders.Ready)
        energy_before_j = self._read_energy_j()
        before, held_up_s = self._used_s, self._process.held_up_s()
        samples = self._ask(orders.Burst(seconds, most), orders.Samples).samples_ms
        held_up_s = self._process.held_up_s() - held_up_s
        said_ms, seen_ms = sum(samples), 1e3 * (self._used_s - before - held_up_s)
        beyond_ms = seen_ms - CLOCK_FACTOR * said_ms - CLOCK_MS * len(samples)
        burst = (beyond_ms, said_ms, seen_ms)
        self._closest = min(self._closest or burst, burst)
        energy_j = self._read_energy_j()
        if self.energy_j is None or energy_before_j is None or energy_j is None:
            self.energy_j = None
        else:
            self.energy_j += max(0.0, energy_j - energy_before_j)
        return samples

    def read(self) -> orders.Counters:
        """The machine's counters, as the process sees them."""
        return self._ask(orders.Read(), orders.Counters)

    def _read_energy_j(self) -> float | None:
        """None on a CPU, which says nothing of a process."""
        if self.task.device == "cpu":
            return None
        return self._ask(orders.ReadEnergy(), orders.Energy).energy_j

    def finish(self, stop_rule: StopRule) -> Row:
        """Have the last results checked; the row, without what only others know."""
        self._process.send(msgspec.json.encode(orders.Finish(stop_rule)))
        row = self._end()
        beyond_ms, said_ms, seen_ms = self._closest or (0.0, 0.0, 0.0)
        if row.status == "ok" and beyond_ms > 0:
            reason = (
                f"the samples of a burst add up to {said_ms:.3g} ms, which took {seen_ms:.3g} ms "
                "by another process's clock, and no burst comes closer: its own is not to be "
                "trusted"
            )
            return replace(row, status="impossible", reason=reason)
        return row

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.finish()

    def _ask(self, order: orders.Order, expected: type[A]) -> A:
        self._process.send(msgspec.json.encode(order))
        return self._answer(expected)

    def _answer(self, expected: type[A]) -> A:
        began = time.monotonic()
        message = self._process.receive(self._limit_s - self._used_s)
        self._used_s += time.monotonic() - began
        if message is None:
            raise Ended(self._end())
        answer = msgspec.json.decode(message, type=orders.Response)
        assert isinstance(answer, expected), answer
        return answer

    def _end(self) -> Row:
        """Its row, whatever became of it."""
        ending = self._process.finish(max(0.0, self._limit_s - self._used_s))
        if ending.reply is None:
            status, reason = ending.problem(self._limit_s)
            output = ending.output or None
            return row_of(self.task, status, reason, output=output, wall_s=self._used_s)
        row = msgspec.json.decode(ending.reply, type=Row)
        own_s = row.wall_s or 0.0
        output = None if row.status == "ok" else ending.output or None
        return replace(
            row,
            wall_s=max(self._used_s, own_s),
            overhead_s=max(0.0, self._used_s - own_s),
            output=output,
        )
