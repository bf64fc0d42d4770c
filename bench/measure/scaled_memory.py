"""What many cells will need, of which few are predicted: the others follow from their sizes.

Cells that differ in batch, resolution, channels and embedding alone run the same operations on
tensors of other sizes. So one step is made in which these sizes are primes: the bytes of each
storage then tell by their factors which sizes they are a product of, and what is alive at any
moment is a polynomial in the sizes. The largest of these at a cell's own sizes is its peak, to the
byte.

That the operations are the same is tested: a second step, at other primes, must find the same
polynomials, and they must give for the largest of the cells what `predict_memory` does. Where they
don't, and for an implementation of another package, every cell is predicted by itself.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.records import Cell, DType, Memory
from resblock_bench.reference.layers import GROUPS

from .memory import tracking
from .predict_memory import MemoryOracle, fake_workload, predict_memory, unpredictable
from .storages import StorageWatch

_SCALED = ("reference", "fused")
_FEW = 4
"""So many cells are predicted one by one in the time that their polynomials take."""

Sizes = tuple[int, ...]
"""Batch, resolution (half of it in a block that halves it), input and output channels of a group,
width of the embedding."""
_PRIMES: tuple[Sizes, ...] = ((101, 103, 107, 109, 113), (1009, 211, 307, 311, 313))
_POINTS: tuple[Sizes, ...] = (_PRIMES[0], (2 * 1009, 2 * 211, 2 * 307, 2 * 311, 2 * 313))
"""Odd sizes and even ones, each with a prime of its own."""

Polynomial = Counter[Sizes]
"""Coefficients by the exponents of the sizes."""


class _Kind(NamedTuple):
    """What cells have in common that differ in their sizes alone.

    cell     with sizes of no meaning
    single   the sizes that are 1: they decide what is contiguous, and so what is copied
    same     whether as many channels come out as go in: then nothing is projected
    batch    where there are operations for each image; else None
    """

    cell: Cell
    single: tuple[bool, ...]
    same: bool
    batch: int | None

    def at(self, sizes: Sizes) -> Cell:
        batch, resolution, channels, out_channels, emb_channels = (
            1 if single else size for size, single in zip(sizes, self.single, strict=True)
        )
        return replace(
            self.cell,
            batch=self.batch or batch,
            resolution=resolution * (2 if self.cell.updown == "down" else 1),
            channels=channels * GROUPS,
            out_channels=(channels if self.same else out_channels) * GROUPS,
            emb_channels=emb_channels,
        )


class _Shape(NamedTuple):
    """The bytes of a step at any sizes."""

    baseline: Polynomial
    moments: list[Polynomial]
    saved: Polynomial

    def at(self, sizes: Sizes) -> Memory:
        baseline = _value(self.baseline, sizes)
        peak = max(_value(moment, sizes) for moment in self.moments)
        return Memory(
            method="fake_tensors",
            baseline_bytes=baseline,
            peak_bytes=peak,
            peak_above_baseline_bytes=peak - baseline,
            saved_for_backward_bytes=_value(self.saved, sizes),
            cold_peak_bytes=None,
            reserved_peak_bytes=None,
            process_bytes=None,
        )


class ScaledMemory:
    """`predict_memory` of cells that are all named before the first is asked for."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        members: dict[_Kind, set[Cell]] = {}
        for cell in cells:
            kind = _kind(cell)
            if kind is not None:
                members.setdefault(kind, set()).add(_nameless(cell))
        self._members = members
        self._known: dict[Cell, Memory | None] = {}
        self._one_by_one = MemoryOracle().memory
        self._shapes: dict[_Kind, _Shape | None] = {}

    def memory(self, cell: Cell) -> Memory | None:
        """As `predict_memory`, and with its errors."""
        cell = _nameless(cell)
        if cell not in self._known:
            # Predicting collects garbage again and again, and what PyTorch has imported is none.
            gc.freeze()
            shape = self._shape(cell)
            self._known[cell] = self._one_by_one(cell) if shape is None else shape.at(_sizes(cell))
        return self._known[cell]

    def _shape(self, cell: Cell) -> _Shape | None:
        kind = _kind(cell)
        if kind is None or unpredictable(cell):
            return None
        if kind not in self._shapes:
            members = self._members[kind]
            self._shapes[kind] = _tested_shape(kind, members) if len(members) > _FEW else None
        return self._shapes[kind]


def _nameless(cell: Cell) -> Cell:
    """Blocks of the same sizes are alike, whatever model they are from."""
    return replace(cell, model=None) if cell.workload == "block" else cell


def _tested_shape(kind: _Kind, members: Iterable[Cell]) -> _Shape | None:
    shape, other = map(_shape, (kind, kind), _POINTS, _PRIMES)
    largest = max(members, key=_sizes)
    return (
        shape if shape == other and shape.at(_sizes(largest)) == predict_memory(largest) else None
    )


def _sizes(cell: Cell) -> Sizes:
    resolution = cell.resolution // (2 if cell.updown == "down" else 1)
    channels = cell.channels // GROUPS, cell.out_channels // GROUPS
    return (cell.batch, resolution, *channels, cell.emb_channels)


def _kind(cell: Cell) -> _Kind | None:
    """None where no polynomial in the sizes is to be expected."""
    halved_unevenly = cell.updown == "down" and cell.resolution % 2
    if cell.workload != "block" or cell.impl not in _SCALED or halved_unevenly:
        return None
    single, same = tuple(size == 1 for size in _sizes(cell)), cell.channels == cell.out_channels
    # How probable dropout is has no size, but its mask has; of 16 bits there are two kinds.
    dtype: DType = "fp32" if cell.dtype == "fp32" else "bf16"
    plain = replace(cell, model=None, dropout=0.5 if cell.dropout else 0.0, dtype=dtype)
    ones = dict.fromkeys(("batch", "resolution", "channels", "out_channels", "emb_channels"), 1)
    # The fused block's path without Triton takes images one by one where channels are contiguous.
    by_image = cell.impl == "fused" and cell.layout == "nhwc"
    return _Kind(replace(plain, **ones), single, same, cell.batch if by_image else None)


def _value(polynomial: Polynomial, sizes: Sizes) -> int:
    total = 0
    for exponents, coefficient in polynomial.items():
        for size, exponent in zip(sizes, exponents, strict=True):
            coefficient *= size**exponent
        total += coefficient
    return total


def _shape(kind: _Kind, point: Sizes, primes: Sizes) -> _Shape:
    """From a step at one point, each of whose sizes has a prime of its own."""
    with FakeTensorMode():
        workload = fake_workload(kind.at(point))
        state = workload.resident()
        # The tracker is there for its hooks: they hold gradients, which is counted, too.
        with tracking(workload), _Ledger(state, point, primes) as ledger:
            baseline = ledger.alive()
            workload.step()
        saved: Polynomial = Counter()
        if workload.mode != "inference":
            with tracking(workload), _Ledger(state, point, primes) as graphs:
                graph = workload.graph()
                gc.collect()
                saved = graphs.alive()
                saved.subtract(baseline)
                del graph
    return _Shape(baseline, _largest([baseline, *ledger.moments], point), +saved)


def _largest(moments: Sequence[Polynomial], point: Sizes) -> list[Polynomial]:
    """Those that no other exceeds everywhere."""
    kept: list[Polynomial] = []
    for moment in sorted(moments, key=lambda moment: -_value(moment, point)):
        if not any(moment <= larger for larger in kept):
            kept.append(moment)
    return sorted(kept, key=lambda moment: sorted(moment.items()))


class _Ledger(StorageWatch):
    """The polynomials of what is alive, at the end of every operator, that of `tensors` with it.

    Of operators in a row the last one is enough, while nothing is let go of between them.
    """

    def __init__(self, tensors: Iterable[Tensor], point: Sizes, primes: Sizes) -> None:
        super().__init__()
        self._point, self._primes = point, primes
        self._bytes: Polynomial = Counter()
        self._ended = False
        self.moments: list[Polynomial] = []
        for tensor in tensors:
            self.see(tensor)

    def alive(self) -> Polynomial:
        """What is alive now."""
        return +self._bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._ended = True
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._remember()

    def born(self, number: int, size: int) -> None:
        exponents, coefficient = _factors(size, self._point, self._primes)
        self._bytes[exponents] += coefficient

    def died(self, number: int, size: int) -> None:
        self._remember()
        exponents, coefficient = _factors(size, self._point, self._primes)
        self._bytes[exponents] -= coefficient

    def _remember(self) -> None:
        if self._ended:
            self.moments.append(self.alive())
            self._ended = False


def _factors(count: int, point: Sizes, primes: Sizes) -> tuple[Sizes, int]:
    """The exponents of the sizes in a count, and what is left of it."""
    exponents = []
    for size, prime in zip(point, primes, strict=True):
        exponent = 0
        while count and count % prime == 0 and count % size == 0:
            count //= size
            exponent += 1
        exponents.append(exponent)
    return tuple(exponents), count
