"""Counts of small kernels that can be worked out by hand, then of the operator itself."""

from __future__ import annotations

import inspect
import tracemalloc

import pytest
import torch
from torch import Tensor

from resblock_bench.bench.compiled.traffic import (
    SECTOR_BYTES,
    Access,
    Counter,
    OutOfBoundsError,
    counting,
)
from resblock_bench.kernels import group_norm_silu, prefer

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
jit = pytest.importorskip("triton.runtime.jit")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("read", "write")


@triton.jit
def copy_kernel(p_x, p_y, n, stride, BLOCK: tl.constexpr):
    """y[i] = x[i·stride]."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o * stride, mask=o < n), mask=o < n)


@triton.jit
def read_twice_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o) + tl.load(p_x + o))


@triton.jit
def repeat_kernel(p_x, p_y, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o // TIMES))


@triton.jit
def either_kernel(p_a, p_b, p_y, BLOCK: tl.constexpr):
    """One load whose lanes go to two tensors in turn."""
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(tl.where(o % 2 == 0, p_a + o, p_b + o)))


@triton.jit
def rows_kernel(p_x, p_y, p_z, stride, BLOCK: tl.constexpr):
    """z[n] = x[n] + y[n] of rows that are `stride` apart."""
    n = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    b_sum = tl.load(p_x + n * stride + o) + tl.load(p_y + n * stride + o)
    tl.store(p_z + n * BLOCK + o, b_sum)


@triton.jit
def scalar_kernel(p_x, p_y, offset):
    tl.store(p_y, tl.load(p_x + offset))


@triton.jit
def read_word(p_x, offset):
    return tl.load((p_x + offset).to(tl.pointer_type(tl.float32)))


@triton.jit
def word_kernel(p_x, p_y, offset):
    """Four of x's bytes as one fp32, read in a function of its own."""
    tl.store(p_y, read_word(p_x, offset))


@triton.jit
def add_kernel(p_x, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(p_x + o, o, mask=o < n)


@triton.jit
def swap_kernel(p_x):
    tl.atomic_cas(p_x, 0, 7)


@triton.jit
def block_pointer_kernel(p_x, p_y, rows, BLOCK: tl.constexpr):
    """Rows of 8, with a block that reaches beyond the last one."""
    x = tl.make_block_ptr(p_x, (rows, 8), (8, 1), (0, 0), (BLOCK, 8), (1, 0))
    y = tl.make_block_ptr(p_y, (rows, 8), (8, 1), (0, 0), (BLOCK, 8), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0,)), boundary_check=(0,))


@triton.jit
def descriptor_kernel(d_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, d_x.load([0]))


@triton.jit
def pair_kernel(pair, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(pair[0] + o) + tl.load(pair[1] + o))


def compiled(p_x):
    """Never launched: it only has to be a kernel that the interpreter does not know."""


def copy(x: Tensor, y: Tensor, n: int, block: int, stride: int = 1) -> None:
    copy_kernel[(-(-n // block),)](x, y, n, stride, BLOCK=block)


def counts(counter: Counter, tensor: str, direction: str, launch: int = 0) -> tuple[int, int, int]:
    """(requested bytes, sectors, distinct bytes) of one tensor."""
    (found,) = [
        access
        for access in counter.accesses()
        if (access.tensor, access.direction, access.launch) == (tensor, direction, launch)
    ]
    return found.requested_bytes, found.sectors, found.distinct_bytes


def seen(counter: Counter) -> set[tuple[str, str]]:
    return {(access.tensor, access.direction) for access in counter.accesses()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_contiguous_copy_asks_for_every_byte_once(dtype: torch.dtype) -> None:
    x, y = torch.randn(256).to(dtype), torch.zeros(256, dtype=dtype)
    with counting() as counter:
        copy(x, y, 256, block=64)
    assert y.equal(x)
    size = 256 * dtype.itemsize
    assert counter.accesses() == [
        Access(
            kernel="copy_kernel",
            launch=0,
            tensor=tensor,
            direction=direction,
            requested_bytes=size,
            sectors=size // SECTOR_BYTES,
            distinct_bytes=size,
        )
        for tensor, direction in (("p_x", "read"), ("p_y", "write"))
    ]


@pytest.mark.parametrize(
    ("dtype", "stride", "sectors"),
    [
        (torch.bfloat16, 16, 64),  # 1/16 of every sector is asked for
        (torch.bfloat16, 40, 64),
        (torch.bfloat16, 2, 8),
        (torch.float32, 8, 64),
        (torch.float32, 4, 32),
    ],
    ids=["bf16 16", "bf16 40", "bf16 2", "fp32 8", "fp32 4"],
)
def test_a_column_takes_a_sector_for_every_element(
    dtype: torch.dtype, stride: int, sectors: int
) -> None:
    with counting() as counter:
        copy(torch.zeros(64, stride, dtype=dtype), torch.empty(64, dtype=dtype), 64, 64, stride)
    asked = 64 * dtype.itemsize
    assert counts(counter, "p_x", "read") == (asked, sectors, asked)
    assert counts(counter, "p_y", "write") == (asked, asked // SECTOR_BYTES, asked)


def test_sectors_are_those_of_one_instruction() -> None:
    """Two programs on either half of a sector take it twice, one program takes it once."""
    x, y = torch.zeros(8), torch.empty(8)
    with counting() as counter:
        copy(x, y, 8, block=4)
        copy(x, y, 8, block=8)
    assert counts(counter, "p_x", "read", launch=0) == (32, 2, 32)
    assert counts(counter, "p_x", "read", launch=1) == (32, 1, 32)


def test_a_misaligned_row_reaches_into_one_sector_more() -> None:
    x = torch.zeros(66)[1:65]
    with counting() as counter:
        copy(x, torch.empty(64), 64, block=64)
    assert counts(counter, "p_x", "read") == (256, 9, 256)


@pytest.mark.parametrize(("offset", "sectors"), [(28, 1), (29, 2), (32, 1)])
def test_an_element_across_a_sector_boundary_takes_both(offset: int, sectors: int) -> None:
    with counting() as counter:
        word_kernel[(1,)](torch.zeros(64, dtype=torch.int8), torch.empty(1), offset)
    assert counts(counter, "p_x", "read") == (4, sectors, 4)


def test_masked_lanes_ask_for_nothing() -> None:
    x, y = torch.zeros(64), torch.empty(64)
    with counting() as counter:
        copy(x, y, 50, block=32)
    assert counts(counter, "p_x", "read") == (200, 4 + 3, 200)
    assert counts(counter, "p_y", "write") == (200, 4 + 3, 200)


def test_a_launch_without_accesses_still_has_its_number() -> None:
    x, y = torch.zeros(32), torch.empty(32)
    with counting() as counter:
        copy_kernel[(1,)](x, y, 0, 1, BLOCK=32)
        copy(x, y, 32, block=32)
    assert {access.launch for access in counter.accesses()} == {1}


def test_a_second_read_is_asked_for_but_not_distinct() -> None:
    with counting() as counter:
        read_twice_kernel[(1,)](torch.zeros(64), torch.empty(64), BLOCK=64)
    assert counts(counter, "p_x", "read") == (2 * 256, 2 * 8, 256)
    assert counts(counter, "p_y", "write") == (256, 8, 256)


def test_lanes_that_share_an_element_ask_for_it_each() -> None:
    with counting() as counter:
        repeat_kernel[(1,)](torch.zeros(16), torch.empty(64), BLOCK=64, TIMES=4)
    assert counts(counter, "p_x", "read") == (256, 2, 64)


def test_a_scalar_is_one_element() -> None:
    with counting() as counter:
        scalar_kernel[(3,)](
            torch.zeros(9, dtype=torch.int64), torch.empty((), dtype=torch.int64), 8
        )
    assert counts(counter, "p_x", "read") == (24, 3, 8)
    assert counts(counter, "p_y", "write") == (24, 3, 8)


def test_booleans_take_a_byte() -> None:
    x = torch.ones(64, dtype=torch.bool)
    with counting() as counter:
        copy(x, torch.empty_like(x), 64, block=64)
    assert counts(counter, "p_x", "read") == (64, 2, 64)


def test_one_instruction_may_read_two_tensors() -> None:
    with counting() as counter:
        either_kernel[(1,)](torch.zeros(64), torch.ones(64), y := torch.empty(64), BLOCK=64)
    assert y.equal(torch.arange(64) % 2)
    for name in ("p_a", "p_b"):
        assert counts(counter, name, "read") == (128, 8, 128)


def test_an_atomic_reads_and_writes() -> None:
    x = torch.zeros(32, dtype=torch.int32)
    with counting() as counter:
        add_kernel[(1,)](x, 20, BLOCK=32)
        swap_kernel[(1,)](x)
    assert x.tolist() == [7, *range(1, 20), *[0] * 12]
    for direction in DIRECTIONS:
        assert counts(counter, "p_x", direction, launch=0) == (80, 3, 80)
        assert counts(counter, "p_x", direction, launch=1) == (4, 1, 4)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_are_counted_within_their_boundary() -> None:
    x, y = torch.randn(13, 8), torch.zeros(13, 8)
    with counting() as counter:
        block_pointer_kernel[(1,)](x, y, 13, BLOCK=16)
    assert y.equal(x)
    for name, direction in (("p_x", "read"), ("p_y", "write")):
        assert counts(counter, name, direction) == (13 * 32, 13, 13 * 32)


def test_descriptors_go_by_their_parameter() -> None:
    descriptors = pytest.importorskip("triton.tools.tensor_descriptor")
    with counting() as counter:
        described = descriptors.TensorDescriptor.from_tensor(torch.zeros(40), [64])
        descriptor_kernel[(1,)](described, torch.empty(64), BLOCK=64)
    assert counts(counter, "d_x", "read") == (160, 5, 160)


def test_tensors_taken_as_another_type_go_by_their_parameter() -> None:
    x, y = torch.zeros(64, dtype=torch.int16), torch.empty(64, dtype=torch.float16)
    with counting() as counter:
        copy(triton.reinterpret(x, tl.float16), y, 64, block=64)
    assert counts(counter, "p_x", "read") == (128, 4, 128)


def test_tensors_of_a_tuple_go_by_their_place() -> None:
    if "tuple" not in inspect.getsource(interpreter._implicit_cvt):
        pytest.skip("this Triton takes no tuples")
    with counting() as counter:
        pair_kernel[(1,)]((torch.zeros(64), torch.zeros(64)), torch.empty(64), BLOCK=64)
    assert seen(counter) == {("pair[0]", "read"), ("pair[1]", "read"), ("p_y", "write")}


def test_launches_are_numbered_in_order() -> None:
    x, y, z = torch.zeros(64), torch.empty(64), torch.empty(64)
    with counting() as counter:
        copy(x, y, 64, block=64)
        read_twice_kernel[(1,)](y, z, BLOCK=64)
        copy(z, x, 32, block=32)
    found = [
        (access.launch, access.kernel, access.tensor, access.distinct_bytes)
        for access in counter.accesses()
    ]
    assert found == [
        (0, "copy_kernel", "p_x", 256),
        (0, "copy_kernel", "p_y", 256),
        (1, "read_twice_kernel", "p_x", 256),
        (1, "read_twice_kernel", "p_y", 256),
        (2, "copy_kernel", "p_x", 128),
        (2, "copy_kernel", "p_y", 128),
    ]


def test_an_address_is_not_given_to_another_tensor() -> None:
    """A result that nobody else holds: the allocator would hand out its memory again, and two
    tensors would pass for one."""
    y = torch.empty(64)
    taken = y.data_ptr()
    with counting() as counter:
        copy(torch.zeros(64), y, 64, block=64)
        del y
        made = [torch.empty(64) for _ in range(1000)]
        assert taken not in {tensor.data_ptr() for tensor in made}
        assert len(counter.accesses()) == 2


def test_what_stays_is_a_byte_for_every_byte() -> None:
    x, y = torch.zeros(2**20, dtype=torch.int8), torch.zeros(2**20, dtype=torch.int8)
    tracemalloc.start()
    try:
        with counting() as counter:
            copy(x, y, 64, block=64)
            stays = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 2 <= stays / 2**20 < 2.5
    assert counts(counter, "p_x", "read") == (64, 2, 64)


def test_halves_of_one_tensor_are_told_apart() -> None:
    """As chunk makes them: their extents overlap, their elements do not."""
    scale, shift = torch.zeros(4, 64).chunk(2, dim=1)
    with counting() as counter:
        rows_kernel[(3,)](scale, shift, torch.empty(4, 32), 64, BLOCK=32)
    assert counts(counter, "p_x", "read") == (3 * 128, 12, 3 * 128)
    assert counts(counter, "p_y", "read") == (3 * 128, 12, 3 * 128)


def test_bytes_that_two_parameters_share_go_by_both() -> None:
    whole = torch.zeros(96)
    with counting() as counter:
        rows_kernel[(1,)](whole[:64], whole[32:], torch.empty(64), 0, BLOCK=64)
    assert counts(counter, "p_x", "read") == (128, 4, 128)
    assert counts(counter, "p_y", "read") == (128, 4, 128)
    assert counts(counter, "p_x/p_y", "read") == (256, 8, 128)


def test_a_kernel_in_place() -> None:
    x = torch.zeros(64)
    with counting() as counter:
        copy(x, x, 64, block=64)
    assert seen(counter) == {("p_x/p_y", "read"), ("p_x/p_y", "write")}


def test_expanded_and_empty_tensors_may_be_arguments() -> None:
    row = torch.zeros(32).expand(4, 32)
    with counting() as counter:
        rows_kernel[(4,)](row, torch.zeros(4, 32), torch.empty(4, 32), 0, BLOCK=32)
        copy_kernel[(1,)](torch.empty(0), torch.zeros(8)[:0], 0, 1, BLOCK=8)
    assert counts(counter, "p_x", "read") == (4 * 128, 4 * 4, 128)


@pytest.mark.parametrize(
    ("offset", "fits"),
    [(-1, False), (0, True), (7, True), (8, False), (2**40, False), (-(2**61), False)],
)
def test_an_address_beyond_the_tensor_raises(offset: int, fits: bool) -> None:
    x, y = torch.zeros(8), torch.zeros(())
    with counting() as counter:
        if fits:
            scalar_kernel[(1,)](x, y, offset)
            return
        address = (x.data_ptr() + 4 * offset) % 2**64
        with pytest.raises(
            OutOfBoundsError,
            match=rf"scalar_kernel, program \(0, 0, 0\), reads 4 bytes at {address:#x}, .*; p_",
        ):
            scalar_kernel[(1,)](x, y, offset)
    assert counter.accesses() == []


def test_the_program_and_a_near_parameter_are_named() -> None:
    x, y = torch.zeros(64)[:50], torch.zeros(64)
    with counting(), pytest.raises(OutOfBoundsError) as raised:
        copy(x, y, 64, block=32)
    assert str(raised.value) == (
        f"copy_kernel, program (1, 0, 0), reads 4 bytes at {x.data_ptr() + 200:#x}, where none of "
        f"its tensor arguments has an element; p_x begins at {x.data_ptr():#x}."
    )


def test_nothing_is_written_beyond_a_tensor() -> None:
    """The view's storage goes on, so the interpreter would carry the store out."""
    whole = torch.zeros(64)
    with counting(), pytest.raises(OutOfBoundsError, match="writes"):
        copy(torch.ones(64), whole[:40], 64, block=64)
    assert not whole.any()


def test_a_gap_between_rows_belongs_to_nobody() -> None:
    half = torch.zeros(4, 64)[:, :32]
    with counting() as counter:
        rows_kernel[(4,)](half, half, torch.empty(4, 32), 64, BLOCK=32)
        with pytest.raises(OutOfBoundsError):
            rows_kernel[(4,)](half, half, torch.empty(4, 64), 64, BLOCK=64)
    # What the second launch did before it went wrong is counted as well.
    assert counts(counter, "p_x/p_y", "read") == (4 * 256, 4 * 8, 4 * 128)
    assert counts(counter, "p_x/p_y", "read", launch=1) == (128, 4, 128)
    assert seen(counter) == {("p_x/p_y", "read"), ("p_z", "write")}


def test_a_tensor_of_another_launch_is_out_of_bounds() -> None:
    x, y = torch.zeros(128), torch.zeros(())
    with counting():
        copy(x, torch.empty(128), 128, block=128)
        with pytest.raises(OutOfBoundsError):
            scalar_kernel[(1,)](x[:64], y, 64)


def test_an_element_that_only_begins_in_the_tensor_is_out_of_bounds() -> None:
    whole = torch.zeros(64, dtype=torch.int8)
    for x in (whole, whole[:32]):  # at the end of the storage, and before it
        with counting():
            word_kernel[(1,)](x, torch.empty(1), len(x) - 4)
            with pytest.raises(OutOfBoundsError, match="reads 4 bytes"):
                word_kernel[(1,)](x, torch.empty(1), len(x) - 3)


def test_masked_lanes_may_point_anywhere() -> None:
    x, y = torch.zeros(50), torch.zeros(50)
    with counting() as counter:
        copy(x, y, 50, block=64)
    assert counts(counter, "p_x", "read") == (200, 7, 200)


def patched() -> list[object]:
    builder = interpreter.InterpreterBuilder
    return [
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        builder.create_atomic_cas,
        interpreter.GridExecutor.__call__,
        jit.JITFunction.run,
    ]


def test_the_interpreter_is_left_as_it_was() -> None:
    x, y = torch.zeros(64), torch.empty(64)
    before = patched()
    with pytest.raises(ZeroDivisionError), counting():
        assert all(a is not b for a, b in zip(patched(), before, strict=True))
        copy(x, y, 64, block=64)
        raise ZeroDivisionError
    assert patched() == before
    with pytest.raises(OutOfBoundsError), counting():
        copy(x, y, 65, block=128)
    assert patched() == before
    with counting() as counter:
        copy(x, y, 64, block=64)
    copy(x, y, 64, block=64)
    assert {access.launch for access in counter.accesses()} == {0}


def test_blocks_within_blocks_count_their_own() -> None:
    x, y = torch.zeros(64), torch.empty(64)
    before = patched()
    with counting() as outer:
        copy(x, y, 64, block=64)
        with counting() as inner:
            copy(x, y, 32, block=32)
            with pytest.raises(OutOfBoundsError):
                copy(x, y, 65, block=128)
        copy(x, y, 16, block=16)
    assert patched() == before
    assert counts(inner, "p_x", "read") == (128, 4, 128)
    assert [counts(outer, "p_x", "read", launch)[0] for launch in (0, 1, 3)] == [256, 128, 64]


def test_other_errors_stay_what_they_are() -> None:
    with counting(), pytest.raises(interpreter.InterpreterError):
        copy_kernel[(1,)](torch.zeros(64), torch.empty(64), 64, 1, BLOCK=48)  # no power of two


def test_without_the_interpreter_nothing_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"set TRITON_INTERPRET=1 .* before Python starts"):
        counting().__enter__()


def test_a_kernel_defined_to_be_compiled_is_refused() -> None:
    """As where the variable is set too late."""
    kernel = jit.JITFunction(compiled)
    with counting(), pytest.raises(RuntimeError, match=r"compiled was defined .* TRITON_INTERPRET"):
        kernel[(1,)](torch.zeros(64))


def test_tensors_elsewhere_are_refused() -> None:
    with counting(), pytest.raises(ValueError, match="p_y of copy_kernel is on meta"):
        copy(torch.zeros(64), torch.empty(64, device="meta"), 64, block=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_the_operator_reads_x_once_and_writes_y_once(
    channels_last: bool, dtype: torch.dtype
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 12, 8, 6).to(dtype).contiguous(memory_format=layout)
    scale, shift = torch.randn(2, 24).chunk(2, dim=1)
    with counting() as counter, prefer("triton"):
        y = group_norm_silu(x, 3, torch.ones(12), torch.zeros(12), scale, shift)
    assert counts(counter, "p_x", "read")[::2] == (x.nbytes, x.nbytes)
    assert counts(counter, "p_y", "write")[::2] == (y.nbytes, y.nbytes)
    assert {("p_x", "write"), ("p_y", "read")}.isdisjoint(seen(counter))
    assert {("p_scale", "read"), ("p_shift", "read")} <= seen(counter)


def test_a_training_step_stays_in_bounds_and_needs_every_byte_of_x() -> None:
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    with counting() as counter, prefer("triton"):
        y = group_norm_silu(x, 2)
        y.backward(torch.randn_like(y))
    for launch, name, direction in (
        (0, "p_x", "read"),
        (0, "p_y", "write"),
        (1, "p_x", "read"),
        (1, "p_dy", "read"),
        (1, "p_dx", "write"),
    ):
        assert counts(counter, name, direction, launch)[2] == x.nbytes
