"""The bytes that Triton kernels touch in global memory, counted by running them in the interpreter.

Every load, store and atomic of every program is seen with its addresses and its mask:

    requested   elements that unmasked lanes ask for, repeats included, times their size
    sectors     distinct 32-byte sectors of one access instruction, summed over the instructions
    distinct    bytes touched at least once

One access instruction is one load or store of one program, however many threads carry it out, so
`sectors` is a lower bound of what L1 asks of L2: a GPU cuts a tile into warps, and two warps that
share a sector may each fetch it. Sectors are cut from the start of a tensor's storage, since CUDA
allocations begin at a multiple of 256 bytes.

An address belongs to the parameters that have an element there, exactly, strides included: gaps
between rows belong to nobody, and what belongs to nobody raises. Storages are taken to be disjoint,
as PyTorch's are.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor, UntypedStorage

AccessDirection = Literal["read", "write"]

SECTOR_BYTES = 32


class Access(Struct, frozen=True, kw_only=True):
    """What one launch of a kernel touched of one tensor, in one direction.

    `launch` numbers the launches of the block from 0. `tensor` is the kernel's parameter;
    names joined by a slash share these bytes.
    """

    kernel: str
    launch: int
    tensor: str
    direction: AccessDirection
    requested_bytes: int
    sectors: int
    distinct_bytes: int


class OutOfBoundsError(Exception):
    """An unmasked lane addressed memory that no tensor argument of the kernel has an element at."""


@dataclass
class _Parameter:
    name: str
    address: int


@dataclass
class _Storage:
    """Memory of some of a launch's parameters. Bit k of owners[b] is set where byte b lies in an
    element of parameters[k]."""

    start: int
    owners: NDArray[np.uint16]
    parameters: list[_Parameter] = field(default_factory=list)

    def add(self, parameter: _Parameter, tensor: Tensor) -> None:
        size = tensor.element_size()
        elements = np.lib.stride_tricks.as_strided(
            self.owners[parameter.address - self.start :],
            (*tensor.shape, size),
            (*(stride * size * 2 for stride in tensor.stride()), 2),  # 2 bytes in an owner
        )
        elements |= np.uint16(1 << len(self.parameters))
        self.parameters.append(parameter)


@dataclass
class _Tally:
    """Counts of the bytes with the same owners; touched: of the whole storage, byte by byte."""

    tensor: str
    direction: AccessDirection
    touched: NDArray[np.bool_]
    requested_bytes: int = 0
    sectors: int = 0


@dataclass
class _Launch:
    kernel: str
    storages: list[_Storage]
    tallies: dict[tuple[int, int, AccessDirection], _Tally] = field(default_factory=dict)
    stray: OutOfBoundsError | None = None


class Counter:
    """What the kernels have touched that were launched in a `counting` block.

    Keeps their tensors' memory, so that an address means the same tensor in every launch. Needs
    a byte more for every byte of a storage, for each launch and direction that touches it.
    """

    def __init__(self) -> None:
        self._launches: list[_Launch] = []
        # Not the tensors: autograd copies a gradient that somebody else holds.
        self._kept: list[UntypedStorage] = []

    def accesses(self) -> list[Access]:
        """In order of launches, and within a launch of the first access."""
        return [
            Access(
                kernel=launch.kernel,
                launch=number,
                tensor=tally.tensor,
                direction=tally.direction,
                requested_bytes=tally.requested_bytes,
                sectors=tally.sectors,
                distinct_bytes=int(np.count_nonzero(tally.touched)),
            )
            for number, launch in enumerate(self._launches)
            for tally in launch.tallies.values()
        ]

    def _begin(self, kernel: str, arguments: dict[str, Any]) -> _Launch:
        storages: dict[int, _Storage] = {}
        for name, tensor in _tensors(arguments):
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} of {kernel} is on {tensor.device}; counting takes tensors on the CPU."
                )
            memory = tensor.untyped_storage()
            self._kept.append(memory)
            if memory.data_ptr() not in storages:
                owners = np.zeros(memory.nbytes(), np.uint16)
                storages[memory.data_ptr()] = _Storage(memory.data_ptr(), owners)
            storages[memory.data_ptr()].add(_Parameter(name, tensor.data_ptr()), tensor)
        self._launches.append(_Launch(kernel, list(storages.values())))
        return self._launches[-1]

    def _record(self, builder: Any, direction: AccessDirection, pointers: Any, mask: Any) -> None:
        """One access instruction. The handles are the interpreter's: NumPy addresses and mask."""
        launch = self._launches[-1]
        # A mask of one lane may come as an integer.
        active = np.asarray(mask).astype(np.bool_)
        addresses = pointers.data[np.broadcast_to(active, pointers.data.shape)]
        # An int1 takes a byte.
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for storage in launch.storages:
            # Unsigned: what lies below the start wraps around and is too large as well.
            offsets = addresses - np.uint64(storage.start)
            inside = offsets < np.uint64(max(0, storage.owners.size - size + 1))
            elements = offsets[inside].astype(np.int64)[:, None] + np.arange(size)
            # The parameters that have every byte of an element.
            owners = np.bitwise_and.reduce(storage.owners[elements], axis=1)
            for bits in np.unique(owners[owners != 0]):
                self._add(launch, storage, int(bits), direction, elements[owners == bits])
            inside[inside] = owners != 0
            addresses = addresses[~inside]
        if addresses.size:
            launch.stray = _stray(launch, builder.grid_idx, direction, int(addresses[0]), size)
            raise launch.stray

    def _add(
        self,
        launch: _Launch,
        storage: _Storage,
        bits: int,
        direction: AccessDirection,
        elements: NDArray[np.int64],
    ) -> None:
        """Byte offsets [element, byte] into a storage, all of the same owners."""
        tally = launch.tallies.get((storage.start, bits, direction))
        if tally is None:
            names = [p.name for k, p in enumerate(storage.parameters) if bits >> k & 1]
            touched = np.zeros(storage.owners.size, np.bool_)
            tally = _Tally("/".join(names), direction, touched)
            launch.tallies[storage.start, bits, direction] = tally
        tally.requested_bytes += elements.size
        # An element that is not aligned to its size may reach into a second sector.
        tally.sectors += np.unique(elements[:, [0, -1]] // SECTOR_BYTES).size
        tally.touched[elements] = True


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what the Triton kernels launched within the block touch. Any thread's launches count,
    and no two may run at once.

    Errors: RuntimeError where kernels are compiled and not interpreted; OutOfBoundsError out of the
    launch, before the access that it names is carried out.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 in the environment "
            "before Python starts."
        )
    from triton.runtime import errors, interpreter, jit

    counter = Counter()
    # Unmasked, block-pointer and descriptor accesses all come down to these four.
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
    launch = interpreter.GridExecutor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        counter._record(self, "read", pointers, mask.data)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any
    ) -> Any:
        counter._record(self, "write", pointers, mask.data)
        return store(self, pointers, value, mask, *rest, **options)

    def counted_rmw(
        self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any
    ) -> Any:
        counter._record(self, "read", pointers, mask.data)
        counter._record(self, "write", pointers, mask.data)
        return rmw(self, operation, pointers, value, mask, *rest, **options)

    def counted_cas(self: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
        counter._record(self, "read", pointers, True)
        counter._record(self, "write", pointers, True)
        return cas(self, pointers, *rest, **options)

    def counted_launch(self: Any, *arguments: Any, **named: Any) -> None:
        # The executor takes launch options such as num_warps too, and drops them.
        signature = inspect.signature(self.fn)
        own = {name: value for name, value in named.items() if name in signature.parameters}
        begun = counter._begin(self.fn.__name__, signature.bind(*arguments, **own).arguments)
        try:
            launch(self, *arguments, **named)
        except errors.InterpreterError:
            # The interpreter wraps every error, once for each function on the way.
            if begun.stray is not None:
                raise begun.stray from None
            raise
        finally:
            begun.storages.clear()

    def refused_launch(self: Any, *arguments: Any, **named: Any) -> None:
        raise RuntimeError(
            f"{self.__name__} was defined to be compiled, so its traffic cannot be counted: set "
            "TRITON_INTERPRET=1 in the environment before Python starts."
        )

    with _replaced(
        (builder, "create_masked_load", counted_load),
        (builder, "create_masked_store", counted_store),
        (builder, "create_atomic_rmw", counted_rmw),
        (builder, "create_atomic_cas", counted_cas),
        (interpreter.GridExecutor, "__call__", counted_launch),
        (jit.JITFunction, "run", refused_launch),
    ):
        yield counter


@contextmanager
def _replaced(*changes: tuple[type, str, Callable[..., Any]]) -> Iterator[None]:
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, replacement in changes:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a launch by parameter; p[0], p[1] … where a parameter is a tuple."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": part for i, part in enumerate(value)})
        elif hasattr(value, "base"):  # a tensor descriptor, or a tensor taken as another type
            yield from _tensors({name: value.base})


def _stray(
    launch: _Launch, program: tuple[int, ...], direction: AccessDirection, address: int, size: int
) -> OutOfBoundsError:
    text = (
        f"{launch.kernel}, program {program}, {direction}s {size} bytes at {address:#x}, "
        "where none of its tensor arguments has an element"
    )
    parameters = [p for storage in launch.storages for p in storage.parameters]
    if parameters:
        nearest = min(parameters, key=lambda p: abs(address - p.address))
        text += f"; {nearest.name} begins at {nearest.address:#x}"
    return OutOfBoundsError(text + ".")
