"""Tiers and launch shapes: arithmetic on a problem's sizes and a GPU's, with no tensor at hand.

A tier says how many programs share a group and where the second pass over it is read from
(docs/kernels.md):

    A   one program holds whole groups in registers: nothing is read twice
    B   one program reads its groups twice, the second time from L2
    C   several programs share a group; launches take as many groups as stay in L2 together
    D   as C, but a group alone is too large for that: the second pass comes from memory
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

Tier = Literal["A", "B", "C", "D"]
Direction = Literal["forward", "backward"]
TIERS: dict[str, Tier] = {"A": "A", "B": "B", "C": "C", "D": "D"}

# Elements of one register-resident tile, padding included: 64 KiB in fp32, 32 registers a thread
# at 512 threads. The backward keeps two such tiles, so it gets half.
RESIDENT_ELEMENTS = {"forward": 16384, "backward": 8192}
# Elements of a tile that is streamed, and those of a thread: one to four 128-bit accesses. The
# backward's lanes keep two or three sums and two tensors, so a thread gets half as many.
STREAM_ELEMENTS = 4096
THREAD_ELEMENTS = {"forward": 16, "backward": 8}
# Those of a thread where the tile is resident: more of them share the thread's prologue.
RESIDENT_THREAD_ELEMENTS = 32
# Above this, the groups that are in flight at once no longer share L2.
TWO_READ_BYTES = 128 * 1024
# Below this, one multiprocessor reads a unit twice sooner than a second launch begins.
LAUNCH_BYTES = 32 * 1024
# A row of a channels-last slab; shorter rows would waste sectors and bursts.
SLAB_BYTES = 128
SECTOR_BYTES = 32
# Channels of a program where a channels-last slab is one large group and is divided.
ROW_CHANNELS = 128
# Of L2, for what is read twice. The rest is for what is written meanwhile.
L2_SHARE = 0.6
# Positions that dropout draws at once: no tile has fewer.
QUAD = 4
# Partial sums that a program folds at once: [slab, splits], padded.
PARTIAL_ELEMENTS = 4096
MAX_SPLITS = 64
# Positions for which a program stores one partial sum (8 to 12 bytes a channel).
MIN_CHUNK = 128


class Machine(NamedTuple):
    """What the choice depends on: multiprocessors, and bytes of L2."""

    sms: int
    l2_bytes: int


class Problem(NamedTuple):
    """Sizes of one call. channels_last: channels are contiguous in memory, else positions are."""

    N: int
    C: int
    HW: int
    G: int
    channels_last: bool
    element_size: int

    @property
    def channels_per_group(self) -> int:
        return self.C // self.G


class Choice(NamedTuple):
    """What can be chosen freely, and what `tune` measures.

    tile: elements of a streamed tile (B, C, D). warps: of a program. waves: programs a
    multiprocessor among which a launch divides its units (C, D). cooperative: statistics and apply
    in one launch (C).
    """

    tier: Tier
    tile: int
    warps: int
    waves: int = 2
    cooperative: bool = False


class Launch(NamedTuple):
    """One direction's launches.

    A unit is a slab of whole groups of one sample. A program works on tiles of `block_c` channels
    by `block_hw` positions; in tiers A and B it owns a unit, in C and D a part of one: one of
    `splits` ranges of `chunk` positions, of one of slab/block_c channel blocks. `units` are taken
    by one launch. cooperative: one launch for all, its programs waiting for each other.
    """

    tier: Tier
    slab: int
    block_c: int
    block_hw: int
    splits: int
    chunk: int
    units: int
    num_warps: int
    cooperative: bool
    reason: str

    @property
    def parts(self) -> int:
        """Programs that share a unit."""
        return ceil_div(self.slab, self.block_c) * self.splits


@functools.lru_cache(maxsize=4096)
def plan_launch(
    direction: Direction, problem: Problem, machine: Machine, tier: Tier | None = None
) -> Launch:
    """The launch of one direction by the rules above; `tier` overrides the first of them.

    Raises ValueError where the tier asked for cannot hold the problem.
    """
    sizes = _Sizes.of(direction, problem, machine)
    if tier is None:
        if sizes.padded <= RESIDENT_ELEMENTS[direction]:
            tier = "A"
        elif sizes.group_bytes <= TWO_READ_BYTES and (
            sizes.units >= machine.sms or sizes.unit_bytes <= LAUNCH_BYTES
        ):
            tier = "B"
        else:
            tier = "C" if sizes.fitting else "D"
        if tier == "C" and _rule(direction, problem, machine, "C").parts == 1:
            tier = "B"  # the same program in one launch
    return _rule(direction, problem, machine, tier)


def _rule(direction: Direction, problem: Problem, machine: Machine, tier: Tier) -> Launch:
    return shape(direction, problem, machine, rule_choice(direction, problem, machine, tier))


def rule_choice(direction: Direction, problem: Problem, machine: Machine, tier: Tier) -> Choice:
    """How the rules run a tier."""
    if tier == "A":
        padded = _Sizes.of(direction, problem, machine).padded
        return Choice(tier, padded, warps_for(padded, RESIDENT_THREAD_ELEMENTS))
    per_thread = THREAD_ELEMENTS[direction]
    tile = STREAM_ELEMENTS * per_thread // 16
    return Choice(tier, tile, warps_for(tile, per_thread))


def shape(direction: Direction, problem: Problem, machine: Machine, choice: Choice) -> Launch:
    """The launch that a choice comes to. Raises ValueError where it cannot hold the problem."""
    sizes = _Sizes.of(direction, problem, machine)
    kib = f"{sizes.group_bytes / 1024:g} KiB a group"
    if choice.tier == "A":
        limit = RESIDENT_ELEMENTS[direction]
        if sizes.padded > limit:
            raise ValueError(
                f"tier A holds {limit} elements a program, and a unit of {sizes.slab} channels by "
                f"{problem.HW} positions is padded to {sizes.padded}; take tier B, C or D."
            )
        why = f"{kib}, in registers: {sizes.padded} ≤ {limit} elements"
        return _whole(problem, choice, sizes, why)
    if choice.tier == "B":
        return _whole(problem, choice, sizes, f"{kib}, {sizes.units} programs, second read from L2")
    if choice.tier == "D":
        why = f"{kib}, statistics and apply each read from memory"
        return _split(problem, choice, sizes.units, machine.sms * choice.waves, why)
    if not sizes.fitting:
        raise ValueError(
            f"tier C reads {sizes.unit_bytes} bytes a second time from L2, and {L2_SHARE:.0%} of "
            f"this GPU's are {int(L2_SHARE * machine.l2_bytes)}; take tier D."
        )
    programs = machine.sms * choice.waves
    if choice.cooperative:
        blocks = ceil_div(sizes.slab, _split_tile(problem, choice)[0])
        if blocks > programs:
            raise ValueError(
                f"a cooperative launch holds {programs} programs at once, and a unit has {blocks}."
            )
        at_once = min(sizes.units, sizes.fitting, programs // blocks)
        why = f"{kib}, second read from L2: one cooperative launch, {at_once} units at a time"
    else:
        # Launches of equal size, as few as L2 allows.
        at_once = ceil_div(sizes.units, ceil_div(sizes.units, sizes.fitting))
        why = f"{kib}, second read from L2: {ceil_div(sizes.units, at_once)} × 2 launches"
    return _split(problem, choice, at_once, programs, why)


def rewrite_launch(problem: Problem, machine: Machine) -> Launch:
    """The launch that writes the output once more from saved statistics: one pass, any tier."""
    return plan_launch("forward", problem, machine, "D")


class _Sizes(NamedTuple):
    """Of one direction: channels and number of units, bytes read of each, and how many fit L2.

    padded: elements of a unit with both sides rounded up to powers of two.
    """

    slab: int
    units: int
    padded: int
    group_bytes: int
    unit_bytes: int
    fitting: int

    @classmethod
    def of(cls, direction: Direction, problem: Problem, machine: Machine) -> _Sizes:
        slab = slab_channels(problem)
        read = problem.HW * problem.element_size * (1 if direction == "forward" else 2)
        return cls(
            slab=slab,
            units=problem.N * ceil_div(problem.C, slab),
            padded=power_of_2(slab) * padded_positions(problem.HW),
            group_bytes=problem.channels_per_group * read,
            unit_bytes=slab * read,
            fitting=int(L2_SHARE * machine.l2_bytes) // (slab * read),
        )


def slab_channels(problem: Problem) -> int:
    """Channels of a unit: one group, or in channels-last as many whole groups as fill a row.

    A channels-last row is at least 128 bytes and a whole number of 32-byte sectors, so that two
    slabs never share a sector; where C itself is no multiple of a sector that is not to be had.
    """
    CG = problem.channels_per_group
    if not problem.channels_last:
        return CG
    sector = SECTOR_BYTES // problem.element_size
    step = math.lcm(CG, sector) if problem.C % sector == 0 else CG
    row = SLAB_BYTES // problem.element_size
    return min(problem.C, step * ceil_div(row, step))


def _whole(problem: Problem, choice: Choice, sizes: _Sizes, reason: str) -> Launch:
    """Tiers A and B: one program a unit."""
    block_c, block_hw = power_of_2(sizes.slab), padded_positions(problem.HW)
    if choice.tier == "B":
        block_hw = min(block_hw, max(QUAD, choice.tile // block_c))
    return Launch(
        tier=choice.tier,
        slab=sizes.slab,
        block_c=block_c,
        block_hw=block_hw,
        splits=1,
        chunk=problem.HW,
        units=sizes.units,
        num_warps=min(choice.warps, warps_for(block_c * block_hw, 8)),
        cooperative=False,
        reason=reason,
    )


def _split(problem: Problem, choice: Choice, units: int, programs: int, reason: str) -> Launch:
    """Tiers C and D: the units of a launch divided among about so many programs, as HW allows."""
    slab, HW = slab_channels(problem), problem.HW
    block_c, block_hw = _split_tile(problem, choice)
    tiles = ceil_div(HW, block_hw)
    share = programs / (units * ceil_div(slab, block_c))
    wanted = math.floor(share) if choice.cooperative else math.ceil(share)
    most = min(MAX_SPLITS, tiles, PARTIAL_ELEMENTS // power_of_2(slab), HW // MIN_CHUNK)
    chunk = ceil_div(tiles, max(1, min(wanted, most))) * block_hw
    return Launch(
        tier=choice.tier,
        slab=slab,
        block_c=block_c,
        block_hw=block_hw,
        splits=ceil_div(HW, chunk),
        chunk=chunk,
        units=units,
        num_warps=min(choice.warps, warps_for(block_c * block_hw, 8)),
        cooperative=choice.cooperative,
        reason=reason,
    )


def _split_tile(problem: Problem, choice: Choice) -> tuple[int, int]:
    """Channels and positions of a tile.

    A program of a slab of several groups has all its channels, so that they fold within it. A slab
    of one group is divided further: in NCHW down to one channel a program where a channel fills a
    tile, whose γ' and β' are then scalars.
    """
    slab = slab_channels(problem)
    if problem.channels_last:
        one_group = slab == problem.channels_per_group
        block_c = min(power_of_2(slab), ROW_CHANNELS) if one_group else power_of_2(slab)
        return block_c, min(padded_positions(problem.HW), max(QUAD, choice.tile // block_c))
    block_hw = min(padded_positions(problem.HW), choice.tile)
    return min(power_of_2(slab), choice.tile // block_hw), block_hw


def padded_positions(HW: int) -> int:
    return max(QUAD, power_of_2(HW))


def warps_for(elements: int, per_thread: int) -> int:
    """From 1 to 16 warps of so many elements a thread; more elements a thread beyond that."""
    return max(1, min(16, power_of_2(elements) // (32 * per_thread)))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
