"""Programs that wait for each other: every order in which they may run, in a model, and the model
against the kernels' own steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ticket_model import (
    TICKETS,
    Add,
    Barrier,
    If,
    Launch,
    Load,
    Place,
    Program,
    Reset,
    Step,
    Store,
    Wait,
    Word,
    explore,
    sequence,
    work_of,
)
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from resblock_bench.kernels import launch as launches
from resblock_bench.kernels import tiers
from resblock_bench.kernels.spec import Modulation, Spec
from resblock_bench.kernels.tiles import work_of as kernel_work_of

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


@triton.jit
def work_kernel(p_is_sums, p_part, lag, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        o_ticket = tl.arange(0, BLOCK)
        is_sums, i_part = kernel_work_of(o_ticket, lag)
        tl.store(p_is_sums + o_ticket, is_sums.to(tl.int32))
        tl.store(p_part + o_ticket, i_part)


@pytest.mark.parametrize("total", range(1, 11))
def test_tickets_of_the_kernels_are_those_of_the_model(total: int) -> None:
    for lag in range(1, total + 1):
        is_sums, part = torch.full((2, 32), -1, dtype=torch.int32)
        work_kernel[(2 * total,)](is_sums, part, lag, BLOCK=32)
        expected = [work_of(ticket, total, lag) for ticket in range(2 * total)]
        pairs = zip(is_sums.tolist(), part.tolist(), strict=True)
        assert [(bool(s), i) for s, i in pairs][: 2 * total] == expected
        # Every part once in each pass, and the output no earlier than the sums of `lag` parts more.
        assert sorted(expected) == [(s, i) for s in (False, True) for i in range(total)]


class Recorder:
    """What programs do to the memory that they share, in the model's words: a list a program.

    The last of several sums and statistics of one part, group or sample counts as all of them.
    """

    def __init__(self, item: launches.Recorded, how: tiers.Launch) -> None:
        self.how = how
        self.backward = item.kernel.__name__ == "backward_kernel"
        self.tensors = {k: t for k, t in item.arguments.items() if isinstance(t, Tensor)}
        self.shape = self.tensors["p_x"].shape
        self.slabs = self.shape[1] // how.slab
        self.programs: list[Program] = [[] for _ in range(item.grid[0])]

    def places(self, name: str, index: int) -> Place | None:
        """What an element belongs to, or None where one program alone needs it."""
        C = self.shape[1]
        shape = self.tensors[name].shape
        at = np.unravel_index(index, shape)
        if name in ("p_partial_mean", "p_partial_m2", "p_group_s1", "p_group_s2"):
            return "partial", int(at[0]), int(at[2])
        if name in ("p_partial_s1", "p_partial_s2", "p_partial_s3"):
            block = at[2] % self.how.slab // self.how.block_c
            part = block * self.how.splits + at[1]
            return "partial", self.unit(at[0], at[2]), int(part)
        if name in (("p_c1", "p_c2") if self.backward else ("p_mean", "p_rstd")):
            return "folded", self.unit(at[0], at[1] * (C // shape[1])), 0
        if name in ("p_y", "p_dx"):
            part = at[1] % self.how.slab // self.how.block_c * self.how.splits
            part += at[2] // self.how.chunk if self.how.split else 0
            return "output", self.unit(at[0], at[1]), int(part)
        if name in ("p_s1", "p_s2"):
            return "sums", self.unit(at[0], at[1]), 0
        if name in ("p_dweight", "p_dbias"):
            return "gradient", int(at[0] // self.how.slab), 0
        return None

    def unit(self, n: Any, c: Any) -> int:
        return int(n * self.slabs + c // self.how.slab)

    def word(self, index: int) -> Word:
        if index == 0:
            return TICKETS
        slabs = self.slabs if self.backward else 0
        return ("slab", index - 1) if index - 1 < slabs else ("unit", index - 1 - slabs)

    def accessed(self, pointers: Any, mask: Any) -> tuple[set[Place], list[Word]]:
        places, words = set(), []
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        for address in addresses.ravel().tolist():
            for name, tensor in self.tensors.items():
                offset = address - tensor.data_ptr()
                if 0 <= offset < tensor.numel() * tensor.element_size():
                    index = offset // tensor.element_size()
                    if name == "p_words":
                        words.append(self.word(index))
                    elif (place := self.places(name, index)) is not None:
                        places.add(place)
        return places, words

    def add(self, builder: Any, *steps: Step) -> None:
        self.programs[builder.grid_idx[0]] += steps


SEMANTICS = {"RELAXED": "relaxed", "ACQUIRE": "acquire", "ACQUIRE_RELEASE": "acq_rel"}


def recorded(
    item: launches.Recorded, how: tiers.Launch, monkeypatch: pytest.MonkeyPatch
) -> list[Program]:
    """The steps of every program of a launch, in the interpreter.

    Who waits is told of one arrival after another, so it is seen for how many it waits.
    """
    recorder = Recorder(item, how)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw = builder.create_atomic_rmw

    def recording_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        places, words = recorder.accessed(pointers, mask)
        assert not words
        if places:
            recorder.add(self, Load(frozenset(places)))
        return load(self, pointers, mask, *rest)

    def recording_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        places, words = recorder.accessed(pointers, mask)
        recorder.add(self, *map(Reset, words))
        if places:
            recorder.add(self, Store(frozenset(places)))
        return store(self, pointers, value, mask, *rest)

    def recording_rmw(
        self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        found = rmw(self, operation, pointers, value, mask, sem, scope)
        assert (operation.name, scope.name) == ("ADD", "GPU")
        _, (word,) = recorder.accessed(pointers, mask)
        if value.data == 1:
            recorder.add(self, Add(word, SEMANTICS[sem.name]))
            return found
        steps = recorder.programs[self.grid_idx[0]]
        wait = Wait(word, SEMANTICS[sem.name], 0)
        if isinstance(steps[-1], Wait) and steps[-1]._replace(count=0) == wait:
            wait = wait._replace(count=steps.pop().count + 1)
        recorder.add(self, wait)
        found.data[...] = wait.count
        return found

    monkeypatch.setattr(builder, "create_masked_load", recording_load)
    monkeypatch.setattr(builder, "create_masked_store", recording_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", recording_rmw)
    monkeypatch.setattr(builder, "create_barrier", lambda self: recorder.add(self, Barrier()))
    item.kernel[item.grid](**item.arguments)
    return [merged(program) for program in recorder.programs]


def merged(program: Program) -> Program:
    """Several loads, or stores, one after the other as one."""
    joined: Program = []
    for step in program:
        last = joined[-1] if joined else None
        if isinstance(step, Load) and isinstance(last, Load):
            joined[-1] = Load(last.places | step.places)
        elif isinstance(step, Store) and isinstance(last, Store):
            joined[-1] = Store(last.places | step.places)
        else:
            joined.append(step)
    return joined


KERNELS = {
    # A slab of one group, in blocks of channels and splits; of several groups; whole units.
    "divided group": tiers.Launch("C", 2, 1, 4, 2, 1, 5, 1, ""),
    "several groups": tiers.Launch("C", 4, 4, 4, 2, 1, 2, 1, ""),
    "two reads": tiers.Launch("B", 2, 2, 4, 1, 2, 0, 1, ""),
    "in registers": tiers.Launch("A", 4, 4, 8, 1, 1, 0, 1, ""),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", KERNELS)
def test_the_kernels_take_the_steps_of_the_model(
    kind: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every barrier, what every atomic orders and for whom a program waits, one after the other."""
    how = KERNELS[kind]
    N, C, HW = 2, 4, 8
    x, rows = torch.randn(N, C, HW), torch.randn(N, C)
    m = Modulation(torch.randn(C), torch.randn(C), rows, rows.clone(), rows.clone())
    spec = Spec(2, 1e-5, True, 0.0, torch.float32)
    with launches.recording() as recording:
        if direction == "forward":
            launches.forward(x, m, None, spec, how)
        else:
            mean, rstd = torch.randn(2, N, 2)
            launches.backward(torch.randn(N, C, HW), x, mean, rstd, m, None, spec, how)
    (item,) = recording
    taken = recorded(item, how, monkeypatch)
    phase = direction if how.split else "whole"
    expected = Launch(phase, N, C // how.slab, how.parts, how.lag).programs()
    if phase == "whole" and direction == "forward":
        # Whole units have nobody to wait for; who reads what they write is another launch.
        assert not any(isinstance(step, Add | Wait) for program in taken for step in program)
    else:
        assert taken == [merged(program) for program in sequence(expected)]
    if (words := item.arguments["p_words"]) is not None:
        assert not words.any()
