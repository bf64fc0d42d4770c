"""Tables of measured launch choices, one JSON file for each architecture, in `tables/`.

`resblock-bench tune` writes them; a call whose bucket is in the table of its architecture takes the
launch that was fastest there. A bucket is (direction, layout, element size, C/G, HW, N·G rounded up
to a power of two).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from .tiers import (
    QUAD,
    Choice,
    Direction,
    Launch,
    Machine,
    Problem,
    Tier,
    power_of_2,
    shape,
)

FOLDER = Path(__file__).parent / "tables"


class Bucket(NamedTuple):
    """Problems that share one choice."""

    direction: Direction
    layout: Literal["nchw", "nhwc"]
    element_size: int
    channels_per_group: int
    positions: int
    groups: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The choice for a bucket, and the times that decided it, in µs (median)."""

    bucket: Bucket
    tier: Tier
    tile: Annotated[int, msgspec.Meta(ge=QUAD, le=2**17)]
    warps: Annotated[int, msgspec.Meta(ge=1, le=32)]
    waves: Annotated[int, msgspec.Meta(ge=1, le=32)]
    tiles: Annotated[int, msgspec.Meta(ge=1, le=256)]
    time_us: float
    rules_us: float

    def __post_init__(self) -> None:
        if power_of_2(self.tile) != self.tile or power_of_2(self.warps) != self.warps:
            raise ValueError("tile and warps must be powers of two")

    @property
    def choice(self) -> Choice:
        return Choice(self.tier, self.tile, self.warps, self.waves, self.tiles)


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured on one architecture, where and when the last entry was added.

    machine: the GPU's name and driver, torch's and triton's versions. commit: of this project,
    "-dirty" where files had changed.
    """

    arch: str
    machine: dict[str, str]
    commit: str
    measured_at: str
    entries: list[Entry]


def bucket_of(direction: Direction, problem: Problem) -> Bucket:
    return Bucket(
        direction,
        "nhwc" if problem.channels_last else "nchw",
        problem.element_size,
        problem.channels_per_group,
        problem.HW,
        power_of_2(problem.N * problem.G),
    )


def launch_for(
    direction: Direction, problem: Problem, machine: Machine, arch: str | None
) -> Launch | None:
    """The measured launch, or None where nothing was measured for this bucket."""
    return None if arch is None else _cached(direction, problem, machine, arch)


@functools.lru_cache(maxsize=4096)
def _cached(direction: Direction, problem: Problem, machine: Machine, arch: str) -> Launch | None:
    choice = _choices(arch).get(bucket_of(direction, problem))
    if choice is None:
        return None
    try:
        launch = shape(direction, problem, machine, choice)
    except ValueError:  # the bucket's other problems may be a little larger
        return None
    return launch._replace(reason=f"measured on {arch}: {launch.reason}")


@functools.cache
def _choices(arch: str) -> dict[Bucket, Choice]:
    path = path_of(arch)
    if not path.exists():
        return {}
    return {entry.bucket: entry.choice for entry in read(path).entries}


def path_of(arch: str) -> Path:
    return FOLDER / f"{arch}.json"


def read(path: Path) -> Table:
    """Raises ValueError, naming the file and what is wrong with it."""
    return decoded(path.read_bytes(), path)


def decoded(content: bytes, path: Path) -> Table:
    """The table that a file holds; raises what `read` does."""
    try:
        return msgspec.json.decode(content, type=Table)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a table of launches ({error}); remove it: the rules then hold until "
            "'resblock-bench tune' writes it again."
        ) from None


generation = 0
"""Of the tables: another number means that launches may be others."""


def forget() -> None:
    """Read the tables again at the next call."""
    global generation
    generation += 1
    _choices.cache_clear()
    _cached.cache_clear()
