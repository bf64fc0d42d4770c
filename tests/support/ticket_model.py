"""The protocol of the kernels' counters as a model that can be explored exhaustively.

A program is a list of steps: what it does to memory that other programs of its launch write or
read, in the order of the kernels' source (tests/kernels/test_ticket_steps.py holds one against the
other). Two kinds of threads take them: the first thread of the block does the atomic operations,
any others store and load. What each is sure to see is a set of places, its view:

    a store adds to the view of the block; a barrier joins the two views
    a release adds the first thread's view to the word's, an acquire the word's view to its own

That is PTX's causality order. A load of a place that is not in the view may return what was there
before the launch, however long ago the store was; so it is a fault, and no stale value has to be
carried about. Every add to a word goes on with what was released there before, a relaxed one too.

Programs start in any order, some number of them at once; each keeps its place until it has ended.
Those that are the first to start have the lowest tickets. Between two atomic operations a program
does nothing that others can notice, so it is enough to try all orders of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Place = tuple[str, int, int]
Word = tuple[str, int]

TICKETS: Word = ("tickets", 0)


class Store(NamedTuple):
    """Plain stores by any threads of the block."""

    places: frozenset[Place]


class Load(NamedTuple):
    """Plain loads by any threads of the block."""

    places: frozenset[Place]


class Barrier(NamedTuple):
    """All threads of the block wait for each other."""


class Add(NamedTuple):
    """An atomic add of 1 by the first thread, which tells the others what it found."""

    word: Word
    sem: str


class If(NamedTuple):
    """The next `steps` only where the last add found `value`."""

    value: int
    steps: int


class Wait(NamedTuple):
    """The first thread reads the word until it is at least `count`."""

    word: Word
    sem: str
    count: int


class Reset(NamedTuple):
    """A plain store of 0 to a word."""

    word: Word


Step = Store | Load | Barrier | Add | If | Wait | Reset
Program = list[Step]


class Launch(NamedTuple):
    """What a launch consists of. phase: "forward" and "backward" of divided units, or "whole"."""

    phase: str
    samples: int
    slabs: int
    parts: int = 1
    lag: int = 0

    @property
    def units(self) -> int:
        return self.samples * self.slabs

    def programs(self) -> list[Program]:
        """By ticket; of whole units by program id."""
        if self.phase == "whole":
            return [
                [store("output", unit, 0), *self.parameters(unit)] for unit in range(self.units)
            ]
        total = self.units * self.parts
        programs = []
        for ticket in range(2 * total):
            is_sums, i = work_of(ticket, total, self.lag)
            unit, part = divmod(i, self.parts)
            own = self.sums(unit, part) if is_sums else self.apply(unit, part)
            draw = [Add(TICKETS, "relaxed"), If(2 * total - 1, 1), Reset(TICKETS)]
            programs.append([*draw, *own])
        return programs

    def sums(self, unit: int, part: int) -> Program:
        """Statistics or sums of a part. Who comes last folds those of the unit."""
        fold = [load(self.partial(unit)), store("folded", unit, 0), *arrive(("unit", unit))]
        arrival = arrive(("unit", unit))
        return [store("partial", unit, part), *arrival, If(self.parts - 1, len(fold)), *fold]

    def apply(self, unit: int, part: int) -> Program:
        """The output of a part. The first part sees to the gradients of the parameters."""
        word = ("unit", unit)
        program = [
            Wait(word, "acquire", self.parts + 1),
            Barrier(),
            load({("folded", unit, 0)}),
            store("output", unit, part),
        ]
        if self.phase == "backward" and part == 0:
            program += [load(self.partial(unit) | {("folded", unit, 0)}), *self.parameters(unit)]
        return [*program, Add(word, "relaxed"), If(2 * self.parts, 1), Reset(word)]

    def parameters(self, unit: int) -> Program:
        """A sample's sums. The last sample's program sums up those of all."""
        slab = unit % self.slabs
        word = ("slab", slab)
        of_samples = {("sums", n * self.slabs + slab, 0) for n in range(self.samples)}
        fold = [load(of_samples), store("gradient", slab, 0), Reset(word)]
        return [store("sums", unit, 0), *arrive(word), If(self.samples - 1, len(fold)), *fold]

    def partial(self, unit: int) -> set[Place]:
        return {("partial", unit, part) for part in range(self.parts)}


def work_of(ticket: int, total: int, lag: int) -> tuple[bool, int]:
    """Whether a ticket is for sums, and of which part: as simple as it can be said."""
    order = [(True, i) for i in range(lag)]
    for i in range(total):
        if lag + i < total:
            order.append((True, lag + i))
        order.append((False, i))
    return order[ticket]


def store(kind: str, i: int, j: int) -> Store:
    return Store(frozenset({(kind, i, j)}))


def load(places: set[Place]) -> Load:
    return Load(frozenset(places))


def arrive(word: Word) -> Program:
    return [Barrier(), Add(word, "acq_rel"), Barrier()]


class Found(NamedTuple):
    """states: how many were visited. fault: what is wrong in one of them, or nothing; then `order`
    says which programs took turns until it was reached."""

    states: int
    fault: str | None
    order: list[int]


class _Running(NamedTuple):
    """step: the next one, always atomic. first, block: views, as sets of bits."""

    step: int
    first: int
    block: int


class _State(NamedTuple):
    """programs: by number; None before the start, () at the end. words: value and view of each."""

    programs: tuple[_Running | tuple[()] | None, ...]
    words: tuple[tuple[int, int], ...]
    stored: int


class _Fault(Exception):
    pass


class Exploration:
    """All schedules of `programs`, of which up to `resident` run at once.

    drawn: programs start in the order of their numbers, since their numbers are that order. Else
    any may start first, as where a number is what the hardware calls a program.
    """

    def __init__(self, programs: list[Program], resident: int, drawn: bool = True) -> None:
        self.programs, self.resident, self.drawn = programs, resident, drawn
        steps = [step for program in programs for step in program]
        words = {step.word for step in steps if isinstance(step, Add | Wait | Reset)}
        self.words = {word: i for i, word in enumerate(sorted(words))}
        places: set[Place] = set()
        for step in steps:
            if isinstance(step, Store | Load):
                places |= step.places
        self.places = {place: 1 << i for i, place in enumerate(sorted(places))}

    def run(self) -> Found:
        start = _State((None,) * len(self.programs), ((0, 0),) * len(self.words), 0)
        came_from: dict[_State, tuple[_State, int] | None] = {start: None}
        ahead = [start]
        while ahead:
            state = ahead.pop()
            moved, number = False, -1
            try:
                for number, after in self.successors(state):
                    moved = True
                    if after not in came_from:
                        came_from[after] = state, number
                        ahead.append(after)
                if not moved:
                    self.check_end(state)
            except _Fault as fault:
                return Found(len(came_from), str(fault), self.order(came_from, state))
        return Found(len(came_from), None, [])

    def order(self, came_from: dict[_State, tuple[_State, int] | None], state: _State) -> list[int]:
        numbers = []
        while (before := came_from[state]) is not None:
            state, number = before
            numbers.append(number)
        return numbers[::-1]

    def successors(self, state: _State) -> Iterator[tuple[int, _State]]:
        """What may come next, and whose step that is. No state comes twice on a way, so who can
        always go on ends."""
        running = sum(isinstance(program, _Running) for program in state.programs)
        for number, program in enumerate(state.programs):
            if program is None:
                if running < self.resident:
                    yield number, self.go_on(state, number, _Running(0, 0, 0))
                if self.drawn:
                    break
            elif isinstance(program, _Running) and self.ready(state, number, program):
                yield number, self.go_on(state, number, program)

    def ready(self, state: _State, number: int, program: _Running) -> bool:
        step = self.programs[number][program.step]
        return not isinstance(step, Wait) or state.words[self.words[step.word]][0] >= step.count

    def go_on(self, state: _State, number: int, program: _Running) -> _State:
        """One atomic step, and all others up to the next; a start may begin with none."""
        steps = self.programs[number]
        words, stored = list(state.words), state.stored
        i, first, block = program
        found = -1
        while i < len(steps):
            step = steps[i]
            if isinstance(step, Add | Wait):
                if i != program.step:
                    break
                found, view = words[self.words[step.word]]
                if step.sem in ("acquire", "acq_rel"):
                    first |= view
                if isinstance(step, Add):
                    if step.sem in ("release", "acq_rel"):
                        view |= first
                    words[self.words[step.word]] = found + 1, view
            elif isinstance(step, If):
                if found != step.value:
                    i += step.steps
            elif isinstance(step, Barrier):
                first = block = first | block
            elif isinstance(step, Store):
                if stored & self.bits(step.places):
                    raise _Fault(f"{number} stores again {self.names(stored, step.places)}")
                stored |= self.bits(step.places)
                block |= self.bits(step.places)
            elif isinstance(step, Load):
                if self.bits(step.places) & ~block:
                    raise _Fault(f"{number} may miss {self.names(~block, step.places)}")
            else:
                self.check_reset(state, number, step.word)
                words[self.words[step.word]] = 0, 0
            i += 1
        done = _Running(i, first, block) if i < len(steps) else ()
        programs = (*state.programs[:number], done, *state.programs[number + 1 :])
        return _State(programs, tuple(words), stored)

    def bits(self, places: frozenset[Place]) -> int:
        return sum(self.places[place] for place in places)

    def names(self, among: int, places: frozenset[Place]) -> list[Place]:
        return sorted(place for place in places if self.places[place] & among)

    def check_reset(self, state: _State, number: int, word: Word) -> None:
        """Nobody may touch a word after its reset, which takes effect at any time."""
        for other, program in enumerate(state.programs):
            if other != number and program != ():
                rest = self.programs[other][program.step if program else 0 :]
                if any(isinstance(s, Add | Wait | Reset) and s.word == word for s in rest):
                    raise _Fault(f"{number} resets {word}, which {other} still needs")

    def check_end(self, state: _State) -> None:
        waiting = [n for n, program in enumerate(state.programs) if isinstance(program, _Running)]
        if waiting:
            raise _Fault(f"{waiting} wait for ever")
        left = [word for word, i in self.words.items() if state.words[i][0] != 0]
        if left:
            raise _Fault(f"{left} are not 0 at the end")
        if state.stored != sum(self.places.values()):
            raise _Fault(f"nobody stored {self.names(~state.stored, frozenset(self.places))}")


def explore(programs: list[Program], resident: int, *, drawn: bool = True) -> Found:
    return Exploration(programs, resident, drawn).run()


def sequence(programs: list[Program]) -> list[Program]:
    """The steps that each program takes where they run one after the other, as in the
    interpreter."""
    values: dict[Word, int] = {}
    taken = []
    for program in programs:
        steps: Program = []
        i, found = 0, -1
        while i < len(program):
            step = program[i]
            if isinstance(step, If):
                if found != step.value:
                    i += step.steps
            else:
                steps.append(step)
            if isinstance(step, Add):
                found = values.get(step.word, 0)
                values[step.word] = found + 1
            elif isinstance(step, Reset):
                values[step.word] = 0
            i += 1
        taken.append(steps)
    return taken
