"""What a profile says: the structs that are written as JSON and checked when read."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from msgspec import Meta
from msgspec.structs import asdict, replace

from resblock_bench.bench import files
from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.records import Ceilings, Cell, Correctness, Count, Positive, Record

from .events import StepStage
from .groups import Group

PROFILE_VERSION = 1
PROFILES, PROFILE, TRACE = "profiles", "profile.json", "trace.json.gz"
MEMORY, ROOFLINE, SNAPSHOT, PROTON = "memory.svg", "roofline.svg", "snapshot.pickle", "proton"

Category = Literal["parameters", "optimizer", "inputs", "gradients", "activations", "temporaries"]
"""What a storage is for; `optimizer` are AdamW's states, masters and the moving average,
`temporaries` what the pass lets go of that has made it."""
Amount = Literal["ns", "launches", "bytes", "flops", "matrix_flops"]
K = TypeVar("K")
R = TypeVar("R", bound=Record)


class Operation(Record, frozen=True, kw_only=True):
    """What a call of an operator moves and computes; see work.py."""

    name: str
    bytes: Count = 0
    flops: Count = 0
    matrix_flops: Count = 0


class ProfilePart(Record, frozen=True, kw_only=True):
    """The share of a module, pass and group in a step. `module` is "" for the whole model or block
    itself, and null for what is in none: the loss, the update, the start of the backward."""

    module: str | None
    stage: StepStage
    group: Group
    ns: Count = 0
    launches: Count = 0
    bytes: Count = 0
    flops: Count = 0
    matrix_flops: Count = 0


class KernelTime(Record, frozen=True, kw_only=True):
    """All runs of a kernel in a pass; on a CPU of an operator, without those that it calls."""

    name: str
    stage: StepStage
    group: Group
    ns: Count
    launches: Positive


class OperatorWork(Operation, frozen=True, kw_only=True):
    """All calls of an operator in a pass."""

    stage: StepStage
    group: Group
    calls: Positive


class MemoryUse(Record, frozen=True, kw_only=True):
    """Live bytes over a step: after the birth of a storage, whenever one is born.

    at       operators of the step, of some hundred stretches where the most is alive
    bytes    of each category, at these; the most of all is the peak
    stages   where each pass begins, in operators
    peak_stage, peak_module   of the operator at the peak
    held     by module, what of activations and temporaries is alive then; "" for the whole itself
    """

    operators: Count
    at: Annotated[list[Count], Meta(min_length=1)]
    bytes: dict[Category, list[Count]]
    stages: list[tuple[Count, StepStage]]
    peak_bytes: Count
    peak_stage: StepStage
    peak_module: str | None
    held: dict[str, Count]

    def __post_init__(self) -> None:
        lengths = {name: len(found) for name, found in self.bytes.items()}
        if lengths != dict.fromkeys(get_args(Category), len(self.at)):
            raise ValueError("the bytes over the step are not whole")
        if sum(self.peak.values()) != self.peak_bytes:
            raise ValueError("the categories do not add up to the peak")

    @property
    def peak_place(self) -> int:
        """The position of the peak."""
        totals = list(map(sum, zip(*self.bytes.values(), strict=True)))
        return totals.index(max(totals))

    @property
    def peak(self) -> dict[Category, int]:
        """By category, what is alive at the peak."""
        place = self.peak_place
        return {name: found[place] for name, found in self.bytes.items()}


class Profile(Record, frozen=True, kw_only=True):
    """One step of a cell. The parts' times add up to `step_ns`, and so do those of the kernels with
    the gaps.

    profiled_ns   the steps that were recorded, of which `step_ns` is the one in the middle
    plain_ns      steps that were not
    left_out      short events for which the trace had no room
    """

    profile_version: int
    id: str
    cell: Cell
    device: str
    device_name: str
    threads: Positive
    seed: int
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    started_at: str
    correctness: Correctness
    ceilings: Ceilings | None
    step_ns: Positive
    profiled_ns: Annotated[list[Positive], Meta(min_length=1)]
    plain_ns: Annotated[list[Positive], Meta(min_length=1)]
    parts: list[ProfilePart]
    kernels: list[KernelTime]
    operators: list[OperatorWork]
    memory: MemoryUse | None
    left_out: Count
    notes: list[str]

    def __post_init__(self) -> None:
        gaps = sum(part.ns for part in self.parts if part.group == "gaps")
        if sum(part.ns for part in self.parts) != self.step_ns:
            raise ValueError("the parts do not add up to the step")
        if sum(kernel.ns for kernel in self.kernels) + gaps != self.step_ns:
            raise ValueError("kernels and gaps do not add up to the step")
        if self.ceilings and self.cell.dtype not in self.ceilings.matrix_flops_per_s:
            raise ValueError("the ceilings lack the cell's dtype")

    def total(self, key: Callable[[ProfilePart], K], amount: Amount = "ns") -> Counter[K]:
        """The step's time, or another amount, by whatever is asked of its parts."""
        found: Counter[K] = Counter()
        for part in self.parts:
            found[key(part)] += getattr(part, amount)
        return found

    def attributed(self, stage: StepStage) -> float | None:
        """The share of a pass's time that belongs to a module, or to an operator outside of any."""
        own = [part for part in self.parts if part.stage == stage]
        whole = sum(part.ns for part in own)
        lost = sum(part.ns for part in own if part.module is None and part.group == "gaps")
        return 1 - lost / whole if whole else None


def read_profiles(folder: Path) -> list[Profile]:
    """The profiles that lie in a folder, such as that of a run; none where there are none.

    Raises InvalidError for one that is damaged.
    """
    return [read_profile(path) for path in sorted((folder / PROFILES).glob(f"*/{PROFILE}"))]


def read_profile(path: Path) -> Profile:
    """Raises InvalidError for one that is damaged, of another version, or no file."""
    try:
        again = "profile the cell again"
        return files.read_versioned(path, Profile, "profile_version", PROFILE_VERSION, again)
    except OSError as error:
        raise InvalidError(f"{path} cannot be read ({error.strerror}): remove it") from None


def summed(items: Iterable[R]) -> list[R]:
    """One for all that differ in amounts only, which are added up, in the order of the first."""
    found: dict[tuple[object, ...], R] = {}
    for item in items:
        fields = asdict(item)
        key = tuple(value for value in fields.values() if not isinstance(value, int))
        if (before := found.get(key)) is not None:
            amounts = {name: one for name, one in fields.items() if isinstance(one, int)}
            item = replace(item, **{n: one + getattr(before, n) for n, one in amounts.items()})
        found[key] = item
    return list(found.values())
