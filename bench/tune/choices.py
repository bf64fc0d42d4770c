"""What `tune` measures: the buckets of a selection, heaviest first, and the choices for each."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import Selection, models, parse_arguments
from resblock_bench.bench.grid.grid import GROUPS, PlannedCell, plan
from resblock_bench.bench.measure.workload import DTYPES, norm_shapes
from resblock_bench.bench.records import Cell
from resblock_bench.kernels import tuned
from resblock_bench.kernels.tiers import (
    QUAD,
    STREAM_ELEMENTS,
    THREAD_ELEMENTS,
    Choice,
    Direction,
    Launch,
    Machine,
    Problem,
    ceil_div,
    plan_launch,
    rule_choice,
    shape,
    slab_channels,
    warps_for,
)
from resblock_bench.kernels.tuned import Bucket

# What is measured where nothing is asked for: what GPUs run these models in.
DEFAULTS: Selection = {"dtype": ("bf16",), "batch": (8, 64), "impl": ("fused",)}
_SITES = ("model", "dims", "resolution", "channels", "out_channels", "conditioning")
# Of a program that owns a unit (B).
TILES = (2048, 4096, 8192)


@dataclass(frozen=True)
class BucketWork:
    """A bucket, the problem that stands for it, and the bytes that all its calls move."""

    bucket: Bucket
    problem: Problem
    dtype: torch.dtype
    weight: int


def select(arguments: Sequence[str]) -> list[PlannedCell]:
    """The cells whose norms are measured, from the axis options of `run`.

    bf16 at batch 8 and 64 unless an axis says otherwise, and the blocks of every published model
    unless one says which blocks.
    """
    given = parse_arguments(arguments)
    if "workload" in given:
        raise UsageError("the norms of blocks are tuned, whatever runs them: leave out workload")
    sites: Selection = {} if any(name in given for name in _SITES) else {"model": models()}
    return plan([{**sites, **DEFAULTS, **given}])


def buckets(planned: Iterable[PlannedCell]) -> list[BucketWork]:
    """The buckets of all norms of these cells, those first whose calls move most bytes.

    A block counts as often as it is in its model, however many of its variants are selected. The
    heaviest problem of a bucket stands for it. Norms over fewer than 4 positions are left out:
    their launch is one program's work in any shape.
    """
    calls: dict[tuple[Direction, Problem, torch.dtype], int] = {}
    variants = {
        msgspec.structs.replace(item.cell, impl="fused", checkpoint="none"): item.multiplicity
        for item in planned
    }
    for cell, count in variants.items():
        directions: tuple[Direction, ...] = ("forward", "backward")
        for direction in directions if cell.mode == "train" else directions[:1]:
            for problem in norms(cell):
                key = direction, problem, DTYPES[cell.dtype]
                calls[key] = calls.get(key, 0) + count
    found: dict[Bucket, list[BucketWork]] = {}
    for (direction, problem, dtype), count in calls.items():
        if problem.HW >= QUAD:
            passes = 2 if direction == "forward" else 3
            size = problem.N * problem.C * problem.HW * problem.element_size
            bucket = tuned.bucket_of(direction, problem)
            work = BucketWork(bucket, problem, dtype, count * passes * size)
            found.setdefault(bucket, []).append(work)
    works = []
    for members in found.values():
        first = max(members, key=lambda work: (work.weight, work.problem, str(work.dtype)))
        total = sum(work.weight for work in members)
        works.append(BucketWork(first.bucket, first.problem, first.dtype, total))
    return sorted(works, key=lambda work: (-work.weight, work.bucket))


def norms(cell: Cell) -> tuple[Problem, Problem]:
    """The two norms of a block."""

    def problem(channels: int, positions: int) -> Problem:
        size = DTYPES[cell.dtype].itemsize
        # A single position has its channels contiguous in either layout, and counts as NCHW.
        channels_last = cell.layout == "nhwc" and positions > 1
        return Problem(cell.batch, channels, positions, GROUPS, channels_last, size)

    first, second = norm_shapes(cell)
    return problem(*first), problem(*second)


def candidates(
    direction: Direction, problem: Problem, machine: Machine, known: Choice | None = None
) -> list[Choice]:
    """The choices worth measuring, at most 30; no two launch the same.

    The rules' own is the first, and then `known`, from an earlier run. Left out: dividing units
    (C, D) where each fits registers and there are enough to fill the GPU, or where nothing is
    divided; a program a unit (B) where that leaves more than half of the GPU idle, or where one
    tile is the unit, which is tier A, read twice.
    """
    resident = _shaped(direction, problem, machine, Choice("A", STREAM_ELEMENTS, 16))
    units = problem.N * ceil_div(problem.C, slab_channels(problem))
    rules = plan_launch(direction, problem, machine).tier
    choices = [rule_choice(direction, problem, machine, rules)]
    if known is not None:
        choices.append(known)
    if resident is not None:
        warps = resident.num_warps
        choices += [Choice("A", STREAM_ELEMENTS, w) for w in (warps, warps // 2, warps // 4) if w]
    if rules == "B" or 2 * units >= machine.sms:
        for tile in TILES:
            launch = _shaped(direction, problem, machine, Choice("B", tile, 1))
            if launch is not None and launch.block_hw < problem.HW:
                choices += [Choice("B", tile, warps_for(tile, elements)) for elements in (8, 16)]
    if resident is None or units < machine.sms:
        choices += _divided(direction, problem, machine)
    kept: dict[Launch, Choice] = {}
    for choice in choices:
        launch = _shaped(direction, problem, machine, choice)
        if launch is None:
            continue
        if choice == choices[0] or not launch.split or launch.parts > 1:
            kept.setdefault(_launched_as(launch, problem), choice)
    return list(kept.values())


def _divided(direction: Direction, problem: Problem, machine: Machine) -> list[Choice]:
    """Tier C around the rules' choice, two axes at a time; D where L2 does not hold a unit.

    Tile by warps, with as many bytes a part and in flight as the rules have; then waves by tiles.
    Where C can be had, D's one choice is beside it: the rules may expect too little of L2.
    """
    centre = rule_choice(direction, problem, machine, "C")
    if _shaped(direction, problem, machine, centre) is None:
        centre = centre._replace(tier="D")
    tile, waves, tiles = centre.tile, centre.waves, centre.tiles
    choices = []
    for size in (tile // 2, tile, 2 * tile):
        most = warps_for(size, THREAD_ELEMENTS[direction])
        for warps in (most, max(1, most // 2)):
            same = max(1, waves * tile // size), max(1, tiles * tile // size)
            choices.append(Choice(centre.tier, size, warps, *same))
    at_once = max(1, waves // 2), waves, 2 * waves
    of_part = max(1, tiles // 4), tiles, 4 * tiles
    for some_waves, some_tiles in itertools.product(at_once, of_part):
        choices.append(centre._replace(waves=some_waves, tiles=some_tiles))
    return [*choices, centre._replace(tier="D")]


def _shaped(
    direction: Direction, problem: Problem, machine: Machine, choice: Choice
) -> Launch | None:
    try:
        return shape(direction, problem, machine, choice)
    except ValueError:
        return None


def _launched_as(launch: Launch, problem: Problem) -> Launch:
    """The same for all launches that run the same programs.

    C and D differ in their sizes alone, and tiles beyond the last position are none.
    """
    tier = "C" if launch.tier == "D" else launch.tier
    tiles = min(launch.tiles, ceil_div(problem.HW, launch.block_hw))
    return launch._replace(tier=tier, tiles=tiles, reason="")


def bucket_name(bucket: Bucket) -> str:
    """Such as 'backward nchw 16-bit 6×4096 ×2048': channels a group, positions, groups."""
    return (
        f"{bucket.direction} {bucket.layout} {8 * bucket.element_size}-bit "
        f"{bucket.channels_per_group}×{bucket.positions} ×{bucket.groups}"
    )


def choice_name(choice: Choice) -> str:
    """Such as 'C 4096 w8 ×2 t4': tier, tile, warps, waves, tiles; those that its tier reads."""
    if choice.tier == "A":
        return f"A w{choice.warps}"
    name = f"{choice.tier} {choice.tile} w{choice.warps}"
    if choice.tier == "B":
        return name
    return f"{name} ×{choice.waves} t{choice.tiles}"
