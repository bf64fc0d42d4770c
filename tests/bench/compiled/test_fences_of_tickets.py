"""What orders the memory accesses of programs that wait for each other, in PTX and in SASS.

PTX names the order, and of which parameter an access is; SASS shows what it is made of on each
architecture. That the orders suffice is the model's part (tests/kernels/test_tickets.py).
"""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

from support import compiled_text
from support.compiled_text import Compiled, Statement, statements
from support.kept_workers import KeptWorkers
from support.norms import norm

from resblock_bench.bench.compiled import sass as sass_text
from resblock_bench.bench.compiled.norms import Direction, launch_of
from resblock_bench.bench.compiled.sass import Sass, opcode
from resblock_bench.bench.machine.workers import Job
from resblock_bench.kernels.tiers import Tier

pytestmark = pytest.mark.slow

FORWARD = {"p_partial_mean", "p_partial_m2", "p_mean", "p_rstd"}
OF_SAMPLES = {"p_s1", "p_s2"}
BACKWARD = {
    "p_partial_s1", "p_partial_s2", "p_partial_s3", "p_group_s1", "p_group_s2", "p_c1", "p_c2",
    *OF_SAMPLES,
}  # fmt: skip


# Warps of None: as many as the rules choose.
CASES = [
    ("forward", 80, "nhwc", "C", None),
    ("forward", 90, "nchw", "C", None),
    ("forward", 100, "nhwc", "C", None),
    ("forward", 90, "nhwc", "C", 1),
    ("backward", 80, "nchw", "C", None),
    ("backward", 90, "nhwc", "C", None),
    ("backward", 100, "nchw", "C", None),
    ("backward", 80, "nhwc", "C", 1),
    ("backward", 90, "nchw", "A", None),
    ("backward", 100, "nhwc", "B", None),
]


@pytest.mark.parametrize(("direction", "arch", "layout", "tier", "warps"), CASES)
def test_fences(
    kept_workers: KeptWorkers,
    direction: Direction,
    arch: int,
    layout: str,
    tier: Tier,
    warps: int | None,
) -> None:
    positions = 64 if tier == "A" else 256 if warps == 1 else 1024
    n = norm(channels=128, layout=layout, positions=positions)
    launch = launch_of(n, direction, arch, tier)
    if warps is not None:
        launch = launch._replace(num_warps=warps)
    job = Job(False, compiled_text.compiled, (n, direction, launch, arch))
    code = kept_workers.ask(job).get()
    # Arrivals at a unit's word: of its sums, and of who folded them; in the backward at a slab's.
    shared, arrivals = OF_SAMPLES, 1
    if launch.split:
        shared, arrivals = (FORWARD, 2) if direction == "forward" else (BACKWARD, 3)
    check_ptx(code, shared, arrivals, launch.split)
    check_sass(code.sass, arrivals, launch.split)


def check_ptx(code: Compiled, shared: set[str], arrivals: int, waits: bool) -> None:
    """What a launch both writes and reads is read past L1, behind an acquire and a barrier; words
    are touched by atomics alone, but for their reset."""
    found = statements(code)
    reads: dict[str, set[str]] = {}
    writes: set[str] = set()
    orders: Counter[str] = Counter()
    for operation, parameters, _ in found:
        if not parameters:
            continue
        (parameter,) = parameters
        kind, _, *modifiers = operation.split(".")
        if parameter == "p_words" and kind != "st":
            (order,) = {"relaxed", "acquire", "acq_rel"}.intersection(modifiers)
            assert "gpu" in modifiers
            orders[order] += 1
        elif kind == "ld":
            reads.setdefault(parameter, set()).add("cg" if "cg" in modifiers else "")
        else:
            assert kind == "st"
            writes.add(parameter)
    assert reads.keys() & writes == shared
    assert {name: reads[name] for name in shared} == {name: {"cg"} for name in shared}
    assert orders["acq_rel"] == arrivals
    assert orders["relaxed"] == 2 * waits  # a ticket is drawn, and a program leaves
    assert orders["acquire"] == 2 * waits  # before the loop and in it
    assert not read_too_early(found, shared)


def read_too_early(found: list[Statement], shared: set[str]) -> list[Statement]:
    """What is read on some way with no acquire and no barrier behind it since the program began,
    or since it last stored what others wait for."""
    early = []
    seen: set[tuple[int, str]] = set()
    ahead = [(0, "nothing")]
    while ahead:
        i, known = ahead.pop()
        if (i, known) in seen or i >= len(found):
            continue
        seen.add((i, known))
        operation, parameters, following = found[i]
        kind = operation.partition(".")[0]
        if {"acquire", "acq_rel"}.intersection(operation.split(".")):
            known = "acquired"
        elif kind == "bar" and known == "acquired":
            known = "by all threads"
        elif kind == "st" and parameters & shared:
            known = "nothing"
        elif kind == "ld" and parameters & shared and known != "by all threads":
            early.append(found[i])
        ahead += [(j, known) for j in following]
    return early


def check_sass(sass: Sass, arrivals: int, waits: bool) -> None:
    """Before an arrival a barrier of the block, then a fence of the GPU, with no store in between;
    behind it, as behind every look at a word, L1 is emptied, and then comes a barrier."""
    steps = [(i, kind(line)) for i, line in enumerate(sass.instructions)]
    steps = [(i, k) for i, k in steps if k]
    kinds = [k for _, k in steps]
    arrived, looked, emptied = [], [], 0
    for at, k in enumerate(kinds):
        if k == "atomic" and kinds[at - 1] == "fence":
            assert kinds[at - 2] == "barrier"
            fence = sass.instructions[steps[at - 1][0]]
            assert opcode(fence).split(".")[-1] in ("GPU", "SYS"), fence
            arrived.append(steps[at][0])
            # Whoever asks for no answer need not see what others did.
            if opcode(sass.instructions[steps[at][0]]).startswith("REDG"):
                continue
            assert kinds[at + 1 : at + 3] == ["empty L1", "barrier"]
            emptied += 1
        elif k in ("atomic", "strong load") and kinds[at + 1] == "empty L1":
            assert kinds[at + 2] == "barrier"
            looked.append(steps[at][0])
            emptied += 1
    assert len(arrived) == arrivals
    assert len(looked) == 2 * waits
    assert kinds.count("empty L1") == emptied
    for start in arrived:
        # What the last to arrive folds, until it tells of it or leaves.
        assert "load" not in {kind(sass.instructions[i]) for i in until_atomic(sass, start + 1)}


def kind(instruction: str) -> str | None:
    """What it does to memory that programs share."""
    operation, *modifiers = opcode(instruction).split(".")
    if operation == "LDG":
        return "strong load" if "STRONG" in modifiers else "load"
    if operation == "CCTL":
        return "empty L1" if "IVALL" in modifiers else None
    if operation == "MEMBAR":
        return None if "CTA" in modifiers else "fence"
    names = {"ATOMG": "atomic", "REDG": "atomic", "STG": "store", "BAR": "barrier"}
    return names.get(operation)


def until_atomic(sass: Sass, start: int) -> set[int]:
    """The instructions that may follow before the next atomic operation or the end."""
    found: set[int] = set()
    ahead = [start]
    while ahead:
        i = ahead.pop()
        instruction = sass.instructions[i]
        if i in found or kind(instruction) == "atomic":
            continue
        found.add(i)
        ahead += sass_text._targets(sass, i)
        if not sass_text._ENDS.fullmatch(instruction):
            ahead.append(i + 1)
    return found
