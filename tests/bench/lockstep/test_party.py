"""A party whose process is made up: its clock, its time limit, and what comes of its end."""

from collections.abc import Callable

import msgspec
import pytest
from msgspec.structs import replace

from resblock_bench.bench.lockstep import party as lockstep_party
from resblock_bench.bench.lockstep.party import Ended, Party
from resblock_bench.bench.machine.process import Ending, Processes
from resblock_bench.bench.measure import orders
from resblock_bench.bench.measure.cell import CellJob, Task, row_of
from resblock_bench.bench.records import Row

LIMIT_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Cell:
    """A process: what it answers to each order, and after how many seconds; then its end.

    An answer that comes after the limit does not come.
    """

    def __init__(self, clock: Clock, task: Task, step_s: float, said_ms: float, steps: int) -> None:
        self.clock, self.task, self.step_s = clock, task, step_s
        self.said_ms, self.steps = said_ms, steps
        self.limits: list[float | None] = []
        self.ending: Ending | None = None
        self.answers: list[orders.Response] = [orders.Ready()]
        self.wall_s: float | None = None
        self.silent = False
        self.held_up, self.held_s = 0.0, 0.0
        self.reading_s = 0.0

    def held_up_s(self) -> float:
        return self.held_s

    def send(self, message: bytes) -> None:
        if self.silent:
            return
        match msgspec.json.decode(message, type=orders.Order):
            case orders.Redraw():
                self.answers.append(orders.Ready())
            case orders.Burst():
                self.answers.append(orders.Samples([self.said_ms] * self.steps))
            case orders.ReadEnergy():
                self.clock.now_s += self.reading_s
                self.answers.append(orders.Energy(self.clock.now_s * 100))
            case orders.Finish(stop_rule):
                row = row_of(self.task, "ok", stop_rule=stop_rule, wall_s=self.wall_s)
                self.ending = Ending(msgspec.json.encode(row), 0, output="printed")

    def receive(self, limit_s: float | None = None) -> bytes | None:
        self.limits.append(limit_s)
        answer = self.answers.pop(0) if self.answers else None
        spent = self.step_s * (self.steps if isinstance(answer, orders.Samples) else 1)
        assert limit_s is not None
        self.clock.now_s += min(limit_s, spent)
        self.held_s += self.held_up * spent
        return None if answer is None or spent > limit_s else msgspec.json.encode(answer)

    def finish(self, limit_s: float | None = None) -> Ending:
        self.limits.append(limit_s)
        return self.ending or Ending(None, None, "timing", "last words")

    def kill(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lockstep_party, "time", made)
    return made


@pytest.fixture
def begin(clock: Clock, make_task: Callable[..., Task]) -> Callable[..., tuple[Party, Cell]]:
    def make(step_s: float, said_ms: float, steps: int = 1) -> tuple[Party, Cell]:
        task = make_task()
        cell = Cell(clock, task, step_s, said_ms, steps)

        class Scripted(Processes):
            def start(self, function, argument, *, environment=None):  # type: ignore
                assert msgspec.json.decode(argument, type=CellJob).task == task
                return cell

        job = CellJob(task=task, truths="")
        return Party(Scripted(), job, limit_s=LIMIT_S), cell

    return make


def ended(party: Party, bursts: int) -> Row:
    party.open()
    for _ in range(bursts):
        party.burst(0.0)
    return party.finish("samples")


def test_others_turns_are_not_its_time(begin: Callable, clock: Clock) -> None:
    party, cell = begin(step_s=1.0, said_ms=1000.0)
    party.open()
    for _ in range(3):
        clock.now_s += 1000.0
        party.burst(0.0)
    assert cell.limits == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    cell.silent = True
    with pytest.raises(Ended, match=r"time limit of 10s, in its phase 'timing'") as caught:
        party.burst(5.0)
    assert caught.value.row.status == "timeout"
    assert caught.value.row.output == "last words"


def test_no_time_is_left_to_who_has_used_it_up(begin: Callable) -> None:
    party, cell = begin(step_s=4.0, said_ms=4000.0)
    party.open()
    party._ask(orders.Redraw(), orders.Ready)
    with pytest.raises(Ended):
        party.burst(0.0)
    assert cell.limits == [10.0, 6.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("share", "status"), [(1.0, "ok"), (0.5, "ok"), (0.1, "impossible"), (1e-6, "impossible")]
)
def test_a_clock_is_held_against_another_process_s(
    begin: Callable, share: float, status: str
) -> None:
    """Of what a step takes from outside, so much is what its own clock says."""
    party, _ = begin(step_s=0.05, said_ms=50.0 * share, steps=4)
    row = ended(party, 8)
    assert row.status == status
    if status == "impossible":
        assert "by another process's clock" in (row.reason or "")
        assert "its own is not to be trusted" in (row.reason or "")


def test_a_gpu_is_asked_for_its_energy_beside_a_burst_and_not_within(
    begin: Callable, clock: Clock
) -> None:
    """Its driver takes longer to say than a burst of small steps does."""
    party, cell = begin(step_s=0.001, said_ms=1.0, steps=2)
    party.task = replace(party.task, device="cuda")
    cell.reading_s = 0.5
    assert ended(party, 3).status == "ok"
    # 100 W, for a reading and two steps of each burst.
    assert party.energy_j == pytest.approx(3 * 100 * (0.5 + 0.001 * 3))


def test_one_burst_that_nobody_held_up_clears_a_clock(begin: Callable) -> None:
    """On a busy machine what surrounds a step may take any time."""
    party, cell = begin(step_s=0.05, said_ms=0.1, steps=4)
    party.open()
    for held_up in (True, False, True, True):
        cell.said_ms = 0.1 if held_up else 50.0
        party.burst(0.0)
    assert party.finish("samples").status == "ok"


def test_what_it_waited_for_a_cpu_is_no_lie(begin: Callable) -> None:
    for held_up, status in ((0.0, "impossible"), (0.9, "ok")):
        party, cell = begin(step_s=0.05, said_ms=5.0, steps=4)
        cell.held_up = held_up
        assert ended(party, 8).status == status


def test_what_surrounds_a_tiny_step_is_no_lie(begin: Callable) -> None:
    party, _ = begin(step_s=1e-4, said_ms=0.01, steps=50)
    assert ended(party, 8).status == "ok"


def test_a_row_says_what_the_cell_took(begin: Callable) -> None:
    party, cell = begin(step_s=0.5, said_ms=500.0)
    cell.wall_s = 1.25
    row = ended(party, 2)
    assert (row.wall_s, row.overhead_s) == (2.5, 1.25)
    assert row.output is None  # it went well


def test_what_a_cell_printed_is_kept_where_it_went_wrong(begin: Callable) -> None:
    party, cell = begin(step_s=0.5, said_ms=500.0)
    party.open()
    wrong = replace(row_of(party.task, "wrong", "with other inputs than at first"), wall_s=0.1)
    cell.ending = Ending(msgspec.json.encode(wrong), 0, output="printed")
    cell.silent = True
    with pytest.raises(Ended, match="with other inputs") as caught:
        party.burst(0.0)
    assert (caught.value.row.status, caught.value.row.output) == ("wrong", "printed")
