"""The rules of CUDA's caching allocator, by hand."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.fit.allocator import MIB, CachingAllocator, reserved_peak
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.training import Recipe, Training


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([512] * 4096, 2 * MIB),
        ([513] * 2049, 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 12 * MIB], 32 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([MIB, MIB + 512], 22 * MIB),  # of two pools
    ],
    ids=str,
)
def test_segments_are_rounded_and_shared(sizes: list[int], reserved: int) -> None:
    allocator = CachingAllocator()
    for size in sizes:
        allocator.allocate(size)
    assert allocator.reserved == reserved


@pytest.mark.parametrize(
    ("size", "handed_out"), [(19 * MIB, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512)]
)
def test_a_large_block_is_split_where_more_than_a_mebibyte_is_left(
    size: int, handed_out: int
) -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB), 20 * MIB)
    assert allocator.allocate(size).size == handed_out
    assert allocator.reserved == 20 * MIB


def test_the_smallest_block_that_is_large_enough_is_reused() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(12 * MIB)
    allocator.free(large, 40 * MIB)
    allocator.free(small, 12 * MIB)
    assert allocator.allocate(11 * MIB) is small
    assert allocator.allocate(13 * MIB) is large
    assert allocator.reserved == 52 * MIB


def test_free_neighbours_become_one_block() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for number in (0, 2, 1):
        allocator.free(blocks[number], 5 * MIB)
    allocator.allocate(15 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.free(blocks[3], 5 * MIB)
    allocator.allocate(5 * MIB)
    assert allocator.reserved == 20 * MIB


def test_a_hole_between_what_lives_on_is_no_room_for_more() -> None:
    """Fragmentation: 10 MiB are free in two parts, and 6 MiB at once are not."""
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    allocator.free(blocks[0], 5 * MIB)
    allocator.free(blocks[2], 5 * MIB)
    allocator.allocate(6 * MIB)
    assert allocator.reserved == 40 * MIB


def test_a_step_reuses_what_the_one_before_has_left() -> None:
    # What was there before; one after the other, of which the first has died; one that lives on.
    sizes, deaths = [30 * MIB, 12 * MIB, 12 * MIB, 14 * MIB], [9, 2, 9, 9]
    assert reserved_peak(sizes, deaths, 1) == (30 + 12 + 14) * MIB
    assert reserved_peak([*sizes, 0], [*deaths, 9], 1) == (30 + 12 + 14) * MIB


def test_a_step_reserves_at_least_its_peak(block: Subject) -> None:
    recipe = Recipe(impl="reference", checkpoint="none", precision="fp32")
    with FakeTensorMode():
        watch = Training(block, recipe).watch(256)
    peak = watch.peak().bytes
    assert peak <= watch.reserved_bytes() <= 2 * peak


def test_a_second_step_fits_less_well_into_what_the_first_has_left() -> None:
    """It puts 8 MiB into the segment of 16, 15 into that of 20, and has no room for 11."""
    assert reserved_peak([8 * MIB, 15 * MIB, 11 * MIB], [9, 9, 9], 0) == (20 + 16 + 12) * MIB
