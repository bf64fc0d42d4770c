"""The model of programs that wait for each other against what the kernels do in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.ticket_model import (
    TICKETS,
    Add,
    Barrier,
    Launch,
    Load,
    Place,
    Program,
    Reset,
    Step,
    Store,
    Wait,
    Word,
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
from resblock_bench.kernels.tiles import wait_until
from resblock_bench.kernels.tiles import work_of as kernel_work_of


@triton.jit
def work_kernel(p_is_sums, p_part, lag, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        o_ticket = tl.arange(0, BLOCK)
        is_sums, i_part = kernel_work_of(o_ticket, lag)
        tl.store(p_is_sums + o_ticket, is_sums.to(tl.int32))
        tl.store(p_part + o_ticket, i_part)


@triton.jit
def wait_kernel(p_word, count):
    wait_until(p_word, count)


def test_whoever_waits_for_a_later_program_fails_in_the_interpreter() -> None:
    """Where programs run one after the other, it would wait for ever."""
    word = torch.ones(1, dtype=torch.int32)
    wait_kernel[(1,)](word, 1)
    with pytest.raises(interpreter.InterpreterError, match="waits for ever"):
        wait_kernel[(1,)](word, 2)


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
        N, C = self.shape[:2]
        CG = item.arguments["CG"]
        parts = (N * self.slabs, how.slab // CG, how.parts)
        # What lies in them, which the launch passes flat.
        self.scratch: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("p_partial_mean", "p_partial_m2", "p_group_s1", "p_group_s2"), parts),
            **{f"p_partial_s{i}": (N, how.splits, C) for i in (1, 2, 3)},
            **dict.fromkeys(("p_c1", "p_c2"), (N, C // CG)),
            **dict.fromkeys(("p_s1", "p_s2"), (N, C)),
        }
        self.programs: list[Program] = [[] for _ in range(item.grid[0])]

    def places(self, name: str, index: int) -> Place | None:
        """What an element belongs to, or None where one program alone needs it."""
        C = self.shape[1]
        shape = self.scratch.get(name, self.tensors[name].shape)
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
    "group beside a power of two": tiers.Launch("C", 3, 4, 4, 2, 1, 2, 1, ""),
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
    N, C, HW = 2, 6 if how.slab == 3 else 4, 8
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
