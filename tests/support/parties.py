"""Parties that take turns without a process: what they say is made up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from resblock_bench.bench.lockstep.party import Ended
from resblock_bench.bench.measure.cell import Task, row_of
from resblock_bench.bench.measure.orders import Counters
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import Cell, Row, Status, StopRule

Events = list[tuple[str, Cell]]


@dataclass(eq=False)
class Scripted:
    """A party whose steps have names: open, read 1, burst 1, burst 2, …, read 2, finish.

    samples   of a burst by its number, in milliseconds
    ends      at which step it ends instead, with what status
    events    every step of all parties, in order
    reading   what it reads of the machine by number
    changes   fields of its row
    """

    task: Task
    samples: Callable[[int], list[float]] = lambda number: [10.0]
    ends: Mapping[str, Status] = field(default_factory=dict)
    events: Events = field(default_factory=list)
    reading: Callable[[int], Reading] = lambda number: Reading(t_s=float(number))
    changes: Mapping[str, object] = field(default_factory=dict)
    energy_j: float | None = None

    def __post_init__(self) -> None:
        self.bursts: list[list[float]] = []
        self.asked: list[int | None] = []
        self.reads = 0

    def open(self) -> None:
        self._step("open")

    def read(self) -> Counters:
        self.reads += 1
        self._step(f"read {self.reads}")
        return Counters("test", self.reading(self.reads))

    def burst(self, seconds: float, most: int | None = None) -> list[float]:
        self._step(f"burst {len(self.bursts) + 1}")
        self.asked.append(most)
        self.bursts.append(self.samples(len(self.bursts) + 1)[:most])
        return self.bursts[-1]

    def finish(self, stop_rule: StopRule) -> Row:
        try:
            self._step("finish")
        except Ended as ended:
            return ended.row
        rounds, samples = [*map(len, self.bursts)], [ms for burst in self.bursts for ms in burst]
        found = {"rounds": rounds, "samples_ms": samples, "stop_rule": stop_rule, **self.changes}
        return row_of(self.task, "ok", **found)

    def kill(self) -> None:
        self.events.append(("kill", self.task.cell))

    def _step(self, name: str) -> None:
        self.events.append((name, self.task.cell))
        if name in self.ends:
            raise Ended(row_of(self.task, self.ends[name], f"ended at {name}"))
