"""How variants stand to the reference."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace
from support.made_rows import HOT, NOTHING, within

from resblock_bench.bench.records import Row
from resblock_bench.bench.report.headline import largest_batches, standings

MakeRow = Callable[..., Row]


def block(make_row: MakeRow, speed: float, **changes: object) -> list[Row]:
    """A reference without checkpointing, and a fused row with half its peak and a tenth kept."""
    return [
        make_row(10.0, 2000, 1000, impl="reference", ratio_to_none=within(1.0), **changes),
        make_row(
            10.0 / speed, 1000, 100, impl="fused", ratio=within(speed),
            ratio_to_none=within(speed), **changes,
        ),
    ]  # fmt: skip


def test_a_variant_stands_with_the_geometric_mean_of_its_blocks(make_row: MakeRow) -> None:
    rows = block(make_row, 2.0, batch=1) + block(make_row, 0.5, batch=2)
    (line,) = standings(rows)
    assert (line.kind, line.impl, line.checkpoint) == (("train", "fp32", "nchw"), "fused", "none")
    assert line.speed is not None and line.speed.interval is not None
    assert line.speed.value == pytest.approx(1.0)
    assert line.speed.reach == (0.5, 2.0)
    low, high = line.speed.interval
    assert 0.9 < low < 1 < high < 1.1, "two intervals of a tenth make one that is narrower"
    assert line.peak is not None and line.peak.value == pytest.approx(0.5)
    assert line.kept is not None and line.kept.value == pytest.approx(0.1)
    assert (line.speed.count, line.sites) == (2, 2)


def test_a_disturbed_speed_is_left_out_and_its_bytes_are_not(make_row: MakeRow) -> None:
    reference, fused = block(make_row, 2.0, batch=1)
    rows = [reference, replace(fused, conditions=HOT), *block(make_row, 0.5, batch=2)]
    (line,) = standings(rows)
    assert line.speed is not None and (line.speed.value, line.speed.count) == (0.5, 1)
    assert line.peak is not None and line.peak.count == 2
    assert line.sites == 2


@pytest.mark.parametrize("status", ["wrong", "failed", "impossible"])
def test_a_cell_that_is_not_right_stands_in_no_mean(make_row: MakeRow, status: str) -> None:
    reference, fused = block(make_row, 2.0)
    (line,) = standings([reference, replace(fused, status=status)])
    assert (line.speed, line.speed_to_none, line.peak, line.kept) == (None, None, None, None)
    (line,) = standings([replace(reference, status=status), fused])
    assert (line.peak, line.kept) == (None, None)


def test_nothing_is_kept_where_there_is_no_backward(make_row: MakeRow) -> None:
    (line,) = standings(block(make_row, 2.0, mode="inference"))
    assert line.kept is None
    assert line.peak is not None


def test_steps_that_differ_do_not_share_a_mean(make_row: MakeRow) -> None:
    rows = block(make_row, 2.0) + block(make_row, 0.5, layout="nhwc")
    assert [line.kind[2] for line in standings(rows)] == ["nchw", "nhwc"]


def test_models_and_blocks_do_not_share_a_mean(make_row: MakeRow) -> None:
    model = {"workload": "model", "model": "iddpm-cifar10-uncond"}
    rows = block(make_row, 2.0) + block(make_row, 0.5, **model)
    found = {line.kind: line.speed and line.speed.value for line in standings(rows)}
    assert found == {
        ("train", "fp32", "nchw"): 2.0,
        ("whole models", "train", "fp32", "nchw"): 0.5,
    }


def batches(make_row: MakeRow, peaks: dict[str, dict[int, int]]) -> list[Row]:
    """Rows by variant and batch with their peaks; a step takes 10 ms, that of the fused ones 5."""
    return [
        make_row(
            10.0 if variant == "reference/none" else 5.0,
            peak,
            batch=batch,
            impl=variant.partition("/")[0],
            checkpoint=variant.partition("/")[2],
        )
        for variant, own in peaks.items()
        for batch, peak in own.items()
    ]


def test_at_equal_memory_the_largest_batch_within_the_reference_s_peak_counts(
    make_row: MakeRow,
) -> None:
    rows = batches(
        make_row,
        {
            "reference/none": {2: 2000, 4: 4000},
            "fused/none": {2: 1000, 4: 1900, 8: 4001},
            "fused/selective": {2: 500, 4: 1000, 8: 2000},
        },
    )
    found = {line.best.axes.checkpoint: line for line in largest_batches(rows)}
    assert found["none"].best.axes.batch == 4, "8 images do not fit"
    line = found["selective"]
    assert (line.base.axes.batch, line.limit) == (4, 4500)
    assert line.equal is not None and line.equal.axes.batch == 4
    assert line.best.axes.batch == 8
    assert line.speed.value == pytest.approx(8 / 5 / (4 / 10))
    assert line.speed.low == pytest.approx(line.speed.value * 0.9 / 1.1)
    assert line.speed.high == pytest.approx(line.speed.value * 1.1 / 0.9)


def test_where_the_reference_ran_out_of_memory_the_limit_counts(make_row: MakeRow) -> None:
    rows = batches(make_row, {"reference/none": {2: 2000, 4: 0}, "fused/none": {2: 1900, 4: 3800}})
    rows[1] = replace(rows[1], status="oom", memory_limit_bytes=4400, **NOTHING)
    (line,) = largest_batches(rows)
    assert (line.base.axes.batch, line.limit, line.best.axes.batch) == (2, 4400, 4)


def test_nothing_is_said_of_equal_memory_where_no_larger_batch_fits(make_row: MakeRow) -> None:
    alone = {"reference/none": {4: 4000}, "fused/none": {4: 100}}
    assert largest_batches(batches(make_row, alone)) == []
    larger = {"reference/none": {2: 2000, 4: 4000}, "fused/none": {2: 2001, 8: 4001}}
    assert largest_batches(batches(make_row, larger)) == []
    rows = batches(make_row, {"reference/none": {2: 2000}, "fused/none": {2: 1000, 4: 1900}})
    assert largest_batches([rows[0], rows[1], replace(rows[2], conditions=HOT)]) == []
    assert largest_batches([replace(rows[0], status="wrong"), *rows[1:]]) == []
