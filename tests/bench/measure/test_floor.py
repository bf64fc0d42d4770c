from collections.abc import Callable

import pytest
from msgspec.structs import replace

from resblock_bench.bench.measure.floor import (
    FEWER_OPERATIONS,
    TOLERANCE,
    floor_of,
    impossible,
    judged,
)
from resblock_bench.bench.records import Ceilings, Cell, Row

MakeCell = Callable[..., Cell]
CEILINGS = Ceilings(
    copy_bytes_per_s=1e9,
    peak_bytes_per_s=4e9,
    matrix_flops_per_s={"fp32": 1e12, "bf16": 2e12, "fp16": 4e12},
)
# 32 to 64 channels, 2 images of 8², embedding of 16, scale and shift.
X, OUT, EMB = 2 * 32 * 64, 2 * 64 * 64, 2 * 16
CONV = (32 * 64 * 9 + 64) + (64 * 64 * 9 + 64) + (32 * 64 + 64)  # with the skip's 1×1
REST = 2 * 32 + 2 * 64 + (16 * 128 + 128)  # the norms, the embedding's linear
FORWARD_FLOPS = 2 * (2 * 64 * 64 * (32 * 9 + 64 * 9 + 32) + 2 * 16 * 128)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_every_input_is_read_once_and_every_result_written_once(
    make_cell: MakeCell, dtype: str, size: int
) -> None:
    """Norms, linears and the embedding are always 32 bits wide."""

    def found(mode: str) -> int:
        return floor_of(make_cell(out_channels=64, dtype=dtype, mode=mode), CEILINGS, None).bytes

    inputs = size * (X + CONV) + 4 * (EMB + REST)
    assert found("inference") == found("forward") == inputs + size * OUT
    assert found("train") == 2 * inputs + 2 * size * OUT  # the cotangent, as large as out


def test_the_operations_are_those_of_convolutions_and_linears(make_cell: MakeCell) -> None:
    def found(mode: str) -> int:
        return floor_of(make_cell(out_channels=64, mode=mode), CEILINGS, None).flops

    assert found("inference") == found("forward") == FORWARD_FLOPS
    assert found("train") == 3 * FORWARD_FLOPS  # the gradients of its input and of its weights


def test_the_floor_is_that_of_the_site(make_cell: MakeCell) -> None:
    floors = {
        str(floor_of(make_cell(impl=impl, checkpoint=checkpoint), CEILINGS, 1.0))
        for impl in ("reference", "compiled", "fused")
        for checkpoint in ("none", "selective", "full")
    }
    assert len(floors) == 1


@pytest.mark.parametrize(
    "change",
    [{"dims": 1}, {"dims": 3}, {"updown": "up"}, {"updown": "down"}, {"layout": "nhwc"}],
    ids=str,
)
def test_every_kind_of_block_has_one(make_cell: MakeCell, change: dict[str, object]) -> None:
    floor = floor_of(make_cell(dropout=0.1, **change), CEILINGS, 1.0)
    assert floor.bytes > 0
    assert floor.flops > 0


def test_the_times_are_those_of_the_ceilings(make_cell: MakeCell) -> None:
    for dtype, rate in CEILINGS.matrix_flops_per_s.items():
        floor = floor_of(make_cell(dtype=dtype), CEILINGS, None)
        assert floor.bytes_ms == pytest.approx(floor.bytes / 1e9 * 1e3)
        assert floor.flops_ms == pytest.approx(floor.flops / rate * 1e3)
        assert floor.share is None


def test_the_share_is_that_of_the_longer_time(make_cell: MakeCell) -> None:
    bytes_bound = floor_of(make_cell(), CEILINGS, 2.0)
    assert bytes_bound.bytes_ms > bytes_bound.flops_ms
    assert bytes_bound.share == bytes_bound.bytes_ms / 2.0
    slow = Ceilings(copy_bytes_per_s=1e9, peak_bytes_per_s=4e9, matrix_flops_per_s={"fp32": 1e9})
    flops_bound = floor_of(make_cell(), slow, 2.0)
    assert flops_bound.share == flops_bound.flops_ms / 2.0 > bytes_bound.share


def test_faster_than_any_copy_is_impossible(make_cell: MakeCell) -> None:
    """By its fastest sample: one that left work out is enough."""
    floor = floor_of(make_cell(), CEILINGS, None)
    limit_ms = floor.bytes / 4e9 * 1e3 / TOLERANCE
    assert impossible(floor, CEILINGS, 1.0, limit_ms * 1.001) is None
    reason = impossible(floor, CEILINGS, 1.0, limit_ms * 0.999)
    assert reason is not None
    assert "218.2 KiB" in reason
    assert "0.0559 ms at its fastest" in reason


def test_fewer_operations_than_any_convolution_needs_are_impossible(make_cell: MakeCell) -> None:
    """Winograd's convolutions need fewer than are counted, but not fewer than a quarter."""
    slow = replace(CEILINGS, matrix_flops_per_s={"fp32": 1e9})
    floor = floor_of(make_cell(), slow, None)
    limit_ms = floor.flops_ms / FEWER_OPERATIONS / TOLERANCE
    assert limit_ms > floor.bytes_ms
    assert impossible(floor, slow, limit_ms * 1.001, 1.0) is None
    reason = impossible(floor, slow, limit_ms * 0.999, 1.0)
    assert reason is not None
    assert f"{floor.flops_ms:.3g} ms, and 4 times less at its fastest" in reason


def test_a_row_is_held_against_ceilings(
    make_cell: MakeCell, some_row: Callable[[str], Row]
) -> None:
    row = some_row("train")
    floor = floor_of(row.axes, CEILINGS, None)
    row = replace(row, floor=floor, samples_ms=[1.0], median_ms=1.0)
    found = judged(row, CEILINGS)
    assert found.status == "ok"
    assert found.floor == floor_of(row.axes, CEILINGS, 1.0)
    # By its median for the operations, by its fastest sample for the bytes.
    found = judged(replace(row, samples_ms=[0.01, 1.0]), CEILINGS)
    assert (found.status, found.floor) == ("impossible", floor_of(row.axes, CEILINGS, 1.0))
    assert "the step left work out, or the clock is wrong" in (found.reason or "")
    slow = replace(CEILINGS, matrix_flops_per_s={"fp32": 1e8})
    assert judged(row, slow).status == "impossible"
    for changes in ({"status": "wrong"}, {"floor": None}, {"samples_ms": None}):
        changed = replace(row, **changes)
        assert judged(changed, slow) is changed
