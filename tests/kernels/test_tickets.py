"""Programs that wait for each other: every order in which they may run, in a model of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from support.ticket_model import (
    Add,
    Barrier,
    If,
    Launch,
    Program,
    Reset,
    Step,
    Store,
    Wait,
    explore,
)

LAUNCHES = [
    # lag == parts, more, and all.
    Launch("forward", samples=1, slabs=1, parts=3, lag=3),
    Launch("forward", samples=2, slabs=1, parts=2, lag=2),
    Launch("forward", samples=2, slabs=1, parts=2, lag=3),
    Launch("forward", samples=2, slabs=1, parts=2, lag=4),
    Launch("forward", samples=2, slabs=1, parts=3, lag=4),
    Launch("forward", samples=4, slabs=1, parts=1, lag=1),
    Launch("backward", samples=1, slabs=2, parts=2, lag=2),
    Launch("backward", samples=2, slabs=1, parts=2, lag=2),
    Launch("backward", samples=2, slabs=1, parts=2, lag=4),
    Launch("backward", samples=2, slabs=2, parts=1, lag=2),
    Launch("backward", samples=3, slabs=1, parts=1, lag=1),
    Launch("whole", samples=1, slabs=2),
    Launch("whole", samples=3, slabs=2),
]


def name(launch: Launch) -> str:
    phase, samples, slabs, parts, lag = launch
    return f"{phase}-{samples}x{slabs}-{parts} parts-lag {lag}"


@pytest.mark.parametrize("launch", LAUNCHES, ids=name)
def test_every_schedule_ends_with_every_value_stored_before_it_is_read(launch: Launch) -> None:
    """However many programs run at once, and with every word 0 at the end."""
    programs = launch.programs()
    for resident in range(1, len(programs) + 1):
        found = explore(programs, resident, drawn=launch.phase != "whole")
        assert found.fault is None, (resident, found)
        assert found.states > len(programs)


def test_more_programs_at_once_have_more_schedules() -> None:
    """All that one exploration visits, the next visits, too: none stops early."""
    programs = Launch("forward", 2, 1, 2, 2).programs()
    states = [explore(programs, resident).states for resident in range(1, len(programs) + 1)]
    # One after the other: a way of 8 starts, 4 arrivals, 2 more of the last, 4 waits and 4 leaves.
    assert states[0] == 1 + 8 + 4 + 2 + 4 + 4
    assert states == sorted(set(states))


SMALL = Launch("forward", samples=2, slabs=1, parts=2, lag=2)
BACKWARD = Launch("backward", samples=2, slabs=1, parts=2, lag=2)
WHOLE = Launch("whole", samples=2, slabs=1)

Change = Callable[[Program], Program]


def replace(old: type[Step], new: Callable[[Any], Step], at: str | None = None) -> Change:
    """Every step of a kind replaced; only those of a kind of word."""

    def change(program: Program) -> Program:
        return [
            new(step)
            if isinstance(step, old) and at in (None, getattr(step, "word", (None,))[0])
            else step
            for step in program
        ]

    return change


def arrivals(sem: str, at: str | None = None) -> Change:
    return replace(Add, lambda add: add._replace(sem=sem) if add.sem == "acq_rel" else add, at)


def without_barrier(behind: bool, of: type[Step], at: str) -> Change:
    """No barrier next to the operations on a kind of word, but for those of `leave`."""

    def change(program: Program) -> Program:
        gone = set()
        for i, step in enumerate(program):
            if isinstance(step, of) and step.word[0] == at and step.sem != "relaxed":
                gone.add(i + 1 if behind else i - 1)
        assert all(isinstance(program[i], Barrier) for i in gone)
        # What is conditional may be shorter now.
        changed: Program = []
        for i, step in enumerate(program):
            if isinstance(step, If):
                within = range(i + 1, i + 1 + step.steps)
                step = step._replace(steps=step.steps - len(gone.intersection(within)))
            changed += [] if i in gone else [step]
        return changed

    return change


def condition(value: int, instead: int) -> Change:
    return replace(If, lambda step: step._replace(value=instead) if step.value == value else step)


def flag_first(program: Program) -> Program:
    """The folded statistics stored after the arrival that tells of them."""
    for i, step in enumerate(program):
        if isinstance(step, Store) and ("folded", 0) in {place[:2] for place in step.places}:
            return [*program[:i], *program[i + 1 : i + 4], step, *program[i + 4 :]]
    return program


FAULTS = {
    "arrivals do not release": (SMALL, arrivals("acquire"), "may miss .*partial"),
    "arrivals do not acquire": (SMALL, arrivals("release"), "may miss .*partial"),
    "arrivals are relaxed": (SMALL, arrivals("relaxed"), "may miss .*partial"),
    "no barrier before an arrival": (
        SMALL, without_barrier(False, Add, "unit"), "may miss .*partial",
    ),
    "no barrier behind an arrival": (
        SMALL, without_barrier(True, Add, "unit"), "may miss .*partial",
    ),
    "the wait does not acquire": (
        SMALL, replace(Wait, lambda wait: wait._replace(sem="relaxed")), "may miss .*folded",
    ),
    "no barrier behind the wait": (
        SMALL, without_barrier(True, Wait, "unit"), "may miss .*folded",
    ),
    "folded one arrival early": (SMALL, condition(1, 0), "may miss .*partial"),
    "folded by nobody": (SMALL, condition(1, 2), "wait for ever"),
    "waited for the arrivals alone": (
        SMALL, replace(Wait, lambda wait: wait._replace(count=wait.count - 1)), "may miss .*folded",
    ),
    "the flag before the statistics": (SMALL, flag_first, "may miss .*folded"),
    "reset by the first to leave": (SMALL, condition(4, 3), "resets .* still needs"),
    "a unit's word not reset": (
        SMALL, replace(Reset, lambda _: Barrier(), "unit"), "not 0 at the end",
    ),
    "tickets not reset": (
        SMALL, replace(Reset, lambda _: Barrier(), "tickets"), "not 0 at the end",
    ),
    "tickets reset one early": (SMALL, condition(7, 6), "resets .*tickets.* still needs"),
    "a slab's arrivals do not release": (BACKWARD, arrivals("acquire", "slab"), "may miss .*sums"),
    "a slab's arrivals do not acquire": (BACKWARD, arrivals("release", "slab"), "may miss .*sums"),
    "no barrier before a slab's arrival": (
        BACKWARD, without_barrier(False, Add, "slab"), "may miss .*sums",
    ),
    "no barrier behind a slab's arrival": (
        WHOLE, without_barrier(True, Add, "slab"), "may miss .*sums",
    ),
    "a slab summed one sample early": (WHOLE, condition(1, 0), "may miss .*sums"),
}  # fmt: skip


def faults(programs: list[Program], *, drawn: bool = True) -> dict[int, str]:
    """What is wrong, by how many programs run at once."""
    found = {n: explore(programs, n, drawn=drawn).fault for n in range(1, len(programs) + 1)}
    return {resident: fault for resident, fault in found.items() if fault is not None}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_broken_protocol_is_found(kind: str) -> None:
    launch, change, expected = FAULTS[kind]
    programs = [change(list(program)) for program in launch.programs()]
    found = faults(programs, drawn=launch.phase != "whole")
    assert found
    for fault in found.values():
        assert re.search(expected, fault), found


def test_output_before_the_sums_that_it_waits_for_waits_for_ever() -> None:
    """A lag of one part less than `tiers` asks for would do, since sums go first in each turn."""
    assert not faults(Launch("forward", 1, 1, parts=3, lag=2).programs())
    # Two sums, then an output that waits for the third: where nobody else can run, for ever.
    late = faults(Launch("forward", 1, 1, parts=3, lag=1).programs())
    assert late == {1: "[2] wait for ever"}
    reverse = faults(SMALL.programs()[::-1])
    # Four outputs wait; with a fifth program the sums begin.
    assert set(reverse) == {1, 2, 3, 4}
    assert all("wait for ever" in fault for fault in reverse.values())


def test_program_ids_in_place_of_tickets_wait_for_ever() -> None:
    """Since a program with a higher id may start first, and those that wait may fill the GPU."""
    programs = SMALL.programs()
    assert not faults(programs)
    by_id = faults(programs, drawn=False)
    assert set(by_id) == {1, 2, 3, 4}
    assert all("wait for ever" in fault for fault in by_id.values())


def test_a_part_that_is_drawn_twice_is_found() -> None:
    programs = SMALL.programs()
    assert "stores again [('partial', 0, 0)]" in faults([programs[0], *programs[:-1]])[8]
