"""Turns: processes that are measured in lockstep, of which only one ever computes."""

import random
from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.orders import Counters
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import Conditions, Row, StopRule

from .party import Ended, Party


class Turns:
    """The parties that take turns, in an order drawn anew for every round.

    bursts   of each that is there the samples of each round, in milliseconds
    rows     of each that has ended

    One that ends before its time is no loss of the others'.
    """

    def __init__(self, order: random.Random) -> None:
        self.bursts: dict[Party, list[list[float]]] = {}
        self.rows: dict[Party, Row] = {}
        self._order = order
        self._counters: list[dict[Party, Counters]] = []

    def open(self, party: Party) -> None:
        """Have it check its results, measure its memory, and warm up."""
        self.bursts[party] = []
        self._ask(party, party.open)

    def round(self, seconds: float, most: Callable[[Party], int | None] = lambda _: None) -> None:
        """A burst of each; `most` samples of it, none for 0."""

        def burst(party: Party) -> None:
            if most(party) != 0:
                self.bursts[party].append(party.burst(seconds, most(party)))

        self._each(burst)

    def read(self) -> None:
        """Read the machine's counters, before the first round and after the last."""
        found: dict[Party, Counters] = {}
        self._each(lambda party: found.update({party: party.read()}))
        self._counters.append(found)

    def finish(self, stop: StopRule) -> None:
        """End all: their last results are checked, and their rows are there."""
        self._each(lambda party: self.rows.update({party: party.finish(stop)}))

    def kill(self) -> None:
        """End all that is left, whatever it does."""
        for party in self.bursts:
            party.kill()

    def conditions(self) -> Conditions | None:
        """What the machine went through, the processes counted as one: none is foreign to another.
        None where nobody is left to tell."""
        before, after = self._counters
        if not after:
            return None
        first = next(iter(after))
        images = sum(p.task.cell.batch * sum(map(len, self.bursts[p])) for p in after)
        return conditions(
            *(_joined([found[p].reading for p in after], len(before)) for found in (before, after)),
            source=after[first].source,
            images=images,
            threads=first.task.environment.threads,
        )

    def _each(self, ask: Callable[[Party], object]) -> None:
        for party in self._order.sample(list(self.bursts), len(self.bursts)):
            self._ask(party, partial(ask, party))

    def _ask(self, party: Party, ask: Callable[[], object]) -> None:
        try:
            ask()
        except Ended as ended:
            del self.bursts[party]
            self.rows[party] = ended.row


def _joined(readings: Sequence[Reading], computed: int) -> Reading:
    """The readings of several processes as those of one; `computed` is how many there were."""
    own = [reading.own_cpu_s for reading in readings if reading.own_cpu_s is not None]
    foreign = readings[0].foreign_processes
    return replace(
        readings[0],
        # What one that has gone had computed by then is nobody's.
        own_cpu_s=sum(own) if len(own) == computed else None,
        foreign_processes=None if foreign is None else max(0, foreign - len(readings) + 1),
    )
