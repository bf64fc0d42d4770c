"""What PyTorch's caching allocator for CUDA would reserve for a step: an estimate.

The allocator asks the driver for segments, hands out blocks of them, and keeps what is freed. Its
rules, in c10/cuda/CUDACachingAllocator.cpp with its default settings:

    a block     a multiple of 512 bytes
    a segment   of up to 1 MiB blocks 2 MiB, from a pool of their own; below 10 MiB 20 MiB; else the
                block, rounded up to 2 MiB
    reuse       the smallest free block that is large enough, the lowest of equal ones
    splitting   where 512 bytes are left of a small segment, more than 1 MiB of another
    merging     with free neighbours in its segment

Not in it: cuDNN's and cuBLAS's workspaces, other streams, and what the allocator gives back to the
driver before it runs out of memory. No GPU has confirmed it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

MIB = 2**20
_BLOCK = 512
_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_MEDIUM_SEGMENT = 20 * MIB
_LARGE = 10 * MIB
_LARGE_UNIT = 2 * MIB


class MemoryBlock:
    """A part of a segment; `before` and `after` are its neighbours there."""

    __slots__ = ("address", "after", "before", "size", "used")

    def __init__(
        self, address: int, size: int, before: MemoryBlock | None, after: MemoryBlock | None
    ) -> None:
        self.address, self.size = address, size
        self.before, self.after = before, after
        self.used = False


class CachingAllocator:
    """Segments and blocks without memory. `reserved` is the size of all segments."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int, MemoryBlock]]] = {True: [], False: []}  # small?

    def allocate(self, size: int) -> MemoryBlock:
        """The block that is handed out for so many bytes, at least one."""
        size = _multiple(size, _BLOCK)
        small = size <= _SMALL
        free = self._free[small]
        found = bisect_left(free, size, key=lambda item: item[0])
        block = free.pop(found)[2] if found < len(free) else self._segment(size)
        left = block.size - size
        if left >= _BLOCK if small else left > _SMALL:
            rest = MemoryBlock(block.address + size, left, block, block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.size, block.after = size, rest
            self._keep(rest, small)
        block.used = True
        return block

    def free(self, block: MemoryBlock, size: int) -> None:
        """Take back a block that was allocated for so many bytes."""
        small = _multiple(size, _BLOCK) <= _SMALL
        block.used = False
        for other in (block.before, block.after):
            if other is not None and not other.used:
                free = self._free[small]
                del free[bisect_left(free, (other.size, other.address))]
                block.address = min(block.address, other.address)
                block.size += other.size
                if other is block.before:
                    block.before = other.before
                    if block.before is not None:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after is not None:
                        block.after.before = block
        self._keep(block, small)

    def _segment(self, size: int) -> MemoryBlock:
        if size <= _SMALL:
            whole = _SMALL_SEGMENT
        else:
            whole = _MEDIUM_SEGMENT if size < _LARGE else _multiple(size, _LARGE_UNIT)
        block = MemoryBlock(self.reserved, whole, None, None)
        self.reserved += whole
        return block

    def _keep(self, block: MemoryBlock, small: bool) -> None:
        insort(self._free[small], (block.size, block.address, block))


def reserved_peak(sizes: Sequence[int], deaths: Sequence[int], persistent: int) -> int:
    """Bytes reserved once a step has been made twice.

    sizes        of its storages, in order of their birth
    deaths       how many had been made when each died; more than all for what outlives the step
    persistent   how many of the first were there before it
    """
    allocator, end = CachingAllocator(), len(sizes)
    for size in filter(None, sizes[:persistent]):
        allocator.allocate(size)
    dying: dict[int, list[int]] = {}
    for number in range(persistent, end):
        if sizes[number]:
            dying.setdefault(min(deaths[number], end), []).append(number)
    blocks: dict[int, MemoryBlock] = {}
    for _ in range(2):
        for number in range(persistent, end + 1):
            for dead in dying.get(number, ()):
                allocator.free(blocks.pop(dead), sizes[dead])
            if number < end and sizes[number]:
                blocks[number] = allocator.allocate(sizes[number])
    return allocator.reserved


def _multiple(size: int, unit: int) -> int:
    return -(-size // unit) * unit
