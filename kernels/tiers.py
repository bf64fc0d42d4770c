"""Tiers and launch shapes: arithmetic on a problem's sizes and a GPU's, with no tensor at hand.

A tier says how many programs share a group and where the second pass over it is read from
(docs/kernels.md):

    A   one program holds whole groups in registers: nothing is read twice
    B   one program reads its groups twice, the second time from L2
    C   several programs share a group; they apply so soon after they sum that L2 still has it
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
# Above this, a unit that is one of few is divided even if one program could hold it.
RESIDENT_ELEMENTS_OF_FEW = 8192
# Elements of a tile that is streamed, and those of a thread: one to four 128-bit accesses. The
# backward's lanes keep two or three sums and two tensors, so a thread gets half as many.
STREAM_ELEMENTS = 4096
THREAD_ELEMENTS = {"forward": 16, "backward": 8}
# Tile, warps and programs of a multiprocessor of tiers C and D, for a direction and whether in
# channels-last. Measured on an H100.
SPLIT_TILES = {
    ("forward", False): (4096, 8, 4),
    ("forward", True): (2048, 4, 8),
    ("backward", False): (2048, 8, 4),
    ("backward", True): (2048, 4, 8),
}
# Tiles of a divided unit are made smaller, down to this, before multiprocessors idle.
LEAST_STREAM_ELEMENTS = 1024
# Those of a thread where the tile is resident. Measured on an H100, of units of 8192 elements.
RESIDENT_THREAD_ELEMENTS = {"forward": 64, "backward": 32}
# Above this, the groups that are in flight at once no longer share L2.
TWO_READ_BYTES = 128 * 1024
# Up to this, one multiprocessor reads a unit twice sooner than others could help it.
ALONE_BYTES = 16 * 1024
ALONE_POSITIONS = 64
# Programs a multiprocessor that a launch should have, of whole units and at least.
WHOLE_WAVES = 4
LEAST_WAVES = 2
# What a program of a divided unit reads at most: more would share its prologue, but what is to be
# read twice would have to stay in L2 for longer. In channels-last it does not stay there anyway:
# on an H100 the second pass over units of 4 MiB and more came from memory.
PART_BYTES = {"nchw": 32 * 1024, "nhwc": 128 * 1024}
# A row of a channels-last slab, at least; shorter rows waste sectors and bursts.
ROW_BYTES = 128
SECTOR_BYTES = 32
# Channels of a program where a channels-last slab is one large group and is divided.
ROW_CHANNELS = 128
# Of L2, for what is read twice. The rest is for what is written meanwhile.
L2_SHARE = 0.6
# Positions that dropout draws at once: no tile has fewer.
QUAD = 4
# Positions for which a program stores one partial sum (8 to 12 bytes a channel) in channels-last:
# as a rule, and where multiprocessors would idle.
MIN_CHUNK = 128
LEAST_CHUNK = 32


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
    multiprocessor that are taken to run at once, and tiles: of a program, at most (C, D).
    """

    tier: Tier
    tile: int
    warps: int
    waves: int = 4
    tiles: int = 4


class Launch(NamedTuple):
    """One direction's launch.

    A unit is a slab of whole groups of one sample. A program works on tiles of `block_c` channels
    by `block_hw` positions. In tiers A and B it owns a unit. In C and D a unit has `parts`, each
    one of `splits` ranges of `tiles` tiles, of one of slab/block_c channel blocks; a program draws
    the sums of a part or its output, the output `lag` parts behind.
    """

    tier: Tier
    slab: int
    block_c: int
    block_hw: int
    splits: int
    tiles: int
    lag: int
    num_warps: int
    reason: str

    @property
    def split(self) -> bool:
        """Whether several programs share a unit."""
        return self.tier in ("C", "D")

    @property
    def phase(self) -> str:
        return "split" if self.split else "resident" if self.tier == "A" else "whole"

    @property
    def parts(self) -> int:
        """Programs that share a unit, in each of both passes over it."""
        return ceil_div(self.slab, self.block_c) * self.splits

    @property
    def chunk(self) -> int:
        """Positions of a part, of the last one at most."""
        return self.tiles * self.block_hw

    def programs(self, units: int) -> int:
        """Of the launch: one a unit, or one for the sums and one for the output of every part."""
        return 2 * units * self.parts if self.split else units


@functools.lru_cache(maxsize=4096)
def plan_launch(
    direction: Direction, problem: Problem, machine: Machine, tier: Tier | None = None
) -> Launch:
    """The launch of one direction by the rules above; `tier` overrides the first of them.

    Raises ValueError where the tier asked for cannot hold the problem.
    """
    if tier is not None:
        return shape(direction, problem, machine, rule_choice(direction, problem, machine, tier))
    unit = _Unit.of(direction, problem, slab_channels(problem))
    few = unit.number < LEAST_WAVES * machine.sms
    limit = RESIDENT_ELEMENTS_OF_FEW if few else RESIDENT_ELEMENTS[direction]
    alone = _in_32_bits(problem)
    if alone and unit.padded <= min(limit, RESIDENT_ELEMENTS[direction]):
        tier = "A"
    elif (
        alone
        and unit.group_bytes <= TWO_READ_BYTES
        and (
            unit.number >= WHOLE_WAVES * machine.sms
            or unit.bytes <= ALONE_BYTES
            or problem.HW <= ALONE_POSITIONS
        )
    ):
        tier = "B"
    else:
        choice = rule_choice(direction, problem, machine, "C")
        tier = "C" if _second_read_from_l2(direction, problem, machine, choice) else "D"
    launch = shape(direction, problem, machine, rule_choice(direction, problem, machine, tier))
    if alone and launch.split and launch.parts == 1:  # nothing is divided
        return shape(direction, problem, machine, rule_choice(direction, problem, machine, "B"))
    return launch


def rule_choice(direction: Direction, problem: Problem, machine: Machine, tier: Tier) -> Choice:
    """How the rules run a tier."""
    if tier == "A":
        padded = _Unit.of(direction, problem, slab_channels(problem)).padded
        return Choice(tier, padded, warps_for(padded, RESIDENT_THREAD_ELEMENTS[direction]))
    if tier == "B":
        tile = STREAM_ELEMENTS * THREAD_ELEMENTS[direction] // 16
        return Choice(tier, tile, warps_for(tile, THREAD_ELEMENTS[direction]))
    tile, warps, waves = SPLIT_TILES[direction, problem.channels_last]
    tile_bytes = tile * problem.element_size * _tensors(direction)
    return Choice(
        tier,
        tile,
        warps,
        waves,
        max(1, PART_BYTES["nhwc" if problem.channels_last else "nchw"] // tile_bytes),
    )


def shape(direction: Direction, problem: Problem, machine: Machine, choice: Choice) -> Launch:
    """The launch that a choice comes to. Raises ValueError where it cannot hold the problem."""
    slab = slab_channels(problem)
    unit = _Unit.of(direction, problem, slab)
    kib = f"{unit.group_bytes / 1024:g} KiB a group"
    if choice.tier in ("A", "B") and not _in_32_bits(problem):
        raise ValueError(
            f"tier {choice.tier} addresses a unit in 32 bits, and one of {problem.C} channels by "
            f"{problem.HW} positions lies too far apart; take tier C or D."
        )
    if choice.tier == "A":
        limit = RESIDENT_ELEMENTS[direction]
        if unit.padded > limit:
            raise ValueError(
                f"tier A holds {limit} elements a program, and a unit of {slab} channels by "
                f"{problem.HW} positions is padded to {unit.padded}; take tier B, C or D."
            )
        why = f"{kib}, in registers: {unit.padded} ≤ {limit} elements"
        return _whole(problem, choice, slab, why)
    if choice.tier == "B":
        return _whole(problem, choice, slab, f"{kib}, {unit.number} programs, second read from L2")
    if choice.tier == "D":
        why = f"{kib}, sums and output each read from memory"
        return _split(direction, problem, machine, choice, slab, why)
    if not _second_read_from_l2(direction, problem, machine, choice):
        raise ValueError(
            f"tier C reads units of {unit.bytes} bytes a second time from L2, and "
            f"{L2_SHARE:.0%} of this GPU's are {int(L2_SHARE * machine.l2_bytes)}; take tier D."
        )
    return _split(direction, problem, machine, choice, slab, f"{kib}, second read from L2")


def _in_32_bits(problem: Problem) -> bool:
    """Whether int32 reaches from a unit's first element to its last, with a tile to spare."""
    apart = problem.C if problem.channels_last else slab_channels(problem)
    return apart * padded_positions(problem.HW) < 2**31


def rewrite_launch(problem: Problem, machine: Machine) -> Launch:
    """The launch that writes the output once more from saved statistics: one pass, any tier."""
    return plan_launch("forward", problem, machine, "D")


class _Unit(NamedTuple):
    """A slab of one sample: how many there are, elements with both sides rounded up to powers of
    two, and bytes that one pass reads of it and of a group."""

    number: int
    padded: int
    bytes: int
    group_bytes: int

    @classmethod
    def of(cls, direction: Direction, problem: Problem, slab: int) -> _Unit:
        read = problem.HW * problem.element_size * _tensors(direction)
        return cls(
            number=problem.N * ceil_div(problem.C, slab),
            padded=power_of_2(slab) * padded_positions(problem.HW),
            bytes=slab * read,
            group_bytes=problem.channels_per_group * read,
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
    return min(problem.C, step * ceil_div(ROW_BYTES // problem.element_size, step))


def _second_read_from_l2(
    direction: Direction, problem: Problem, machine: Machine, choice: Choice
) -> bool:
    """Whether L2 holds what is read twice, in small parts."""
    unit = _Unit.of(direction, problem, slab_channels(problem))
    part_bytes = choice.tile * problem.element_size * _tensors(direction)
    return _held(problem, unit, machine, choice, min(part_bytes, unit.bytes))


def _held(problem: Problem, unit: _Unit, machine: Machine, choice: Choice, part_bytes: int) -> bool:
    """Whether L2 holds all that is read before a part is read again.

    In NCHW that is a unit, and the parts of those programs that run meanwhile. In channels-last
    all of the call: rows of slabs far apart were evicted sooner than that on an H100.
    """
    read = unit.number * unit.bytes
    if not problem.channels_last:
        read = min(read, unit.bytes + choice.waves * machine.sms * part_bytes)
    return read <= L2_SHARE * machine.l2_bytes


def _tensors(direction: Direction) -> int:
    """What a pass reads: x, and in the backward dy."""
    return 1 if direction == "forward" else 2


def _whole(problem: Problem, choice: Choice, slab: int, reason: str) -> Launch:
    """Tiers A and B: one program a unit."""
    block_c, block_hw = power_of_2(slab), padded_positions(problem.HW)
    if choice.tier == "B":
        block_hw = min(block_hw, max(QUAD, choice.tile // block_c))
    return Launch(
        tier=choice.tier,
        slab=slab,
        block_c=block_c,
        block_hw=block_hw,
        splits=1,
        tiles=ceil_div(problem.HW, block_hw),
        lag=0,
        num_warps=min(choice.warps, warps_for(block_c * block_hw, 8)),
        reason=reason,
    )


def _split(
    direction: Direction,
    problem: Problem,
    machine: Machine,
    choice: Choice,
    slab: int,
    reason: str,
) -> Launch:
    """Tiers C and D: units in parts of as many tiles as leave enough programs, and fit L2."""
    unit = _Unit.of(direction, problem, slab)
    resident = choice.waves * machine.sms
    enough = LEAST_WAVES * machine.sms
    tile = choice.tile
    block_c, block_hw = _split_tile(problem, tile, slab)

    def parts(tiles: int) -> int:
        return ceil_div(slab, block_c) * ceil_div(problem.HW, block_hw * tiles)

    while unit.number * parts(1) < enough and tile > LEAST_STREAM_ELEMENTS:
        tile //= 2
        block_c, block_hw = _split_tile(problem, tile, slab)
    if problem.channels_last and unit.number * parts(1) < enough:
        block_hw = min(block_hw, LEAST_CHUNK)
    # Twice as many parts as run at once, so that programs that end later hold nobody up.
    tiles = max(1, min(choice.tiles, unit.number * parts(1) // (2 * resident)))
    if problem.channels_last:
        least = ceil_div(min(MIN_CHUNK, problem.HW), block_hw)
        while unit.number * parts(least) < enough and least * block_hw > LEAST_CHUNK:
            least = ceil_div(least, 2)
        tiles = max(tiles, least)
    tile_bytes = min(block_c, slab) * block_hw * problem.element_size * _tensors(direction)
    while (
        choice.tier == "C"
        and tiles > 1
        and not _held(problem, unit, machine, choice, tiles * tile_bytes)
    ):
        tiles -= 1
    tiles = min(tiles, ceil_div(problem.HW, block_hw))
    splits = ceil_div(problem.HW, block_hw * tiles)
    of_unit = ceil_div(slab, block_c) * splits
    return Launch(
        tier=choice.tier,
        slab=slab,
        block_c=block_c,
        block_hw=block_hw,
        splits=splits,
        tiles=tiles,
        # Half of those that run at once sum while the other half applies.
        lag=min(unit.number * of_unit, of_unit + resident // 2),
        # Wide slabs may have larger tiles than were asked for.
        num_warps=min(
            choice.warps * max(1, block_c * block_hw // choice.tile),
            warps_for(block_c * block_hw, THREAD_ELEMENTS[direction]),
        ),
        reason=reason,
    )


def _split_tile(problem: Problem, tile: int, slab: int) -> tuple[int, int]:
    """Channels and positions of a tile.

    A program of a slab of several groups has all its channels, so that they fold within it. A slab
    of one group is divided further: in NCHW down to one channel a program where a channel fills a
    tile, whose γ' and β' are then scalars.
    """
    if problem.channels_last:
        one_group = slab == problem.channels_per_group
        block_c = min(power_of_2(slab), ROW_CHANNELS) if one_group else power_of_2(slab)
        return block_c, min(padded_positions(problem.HW), max(QUAD, tile // block_c))
    block_hw = min(padded_positions(problem.HW), tile)
    return min(power_of_2(slab), tile // block_hw), block_hw


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
