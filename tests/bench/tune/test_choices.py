"""Which calls are tuned, and which launches are tried for each."""

import csv
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from support.published import SHAPES, weighted_sites
from support.tuning import (
    DIRECTIONS,
    H100,
    PROBLEM,
    SMALL,
    choices,
)

from resblock_bench.bench.grid.axes import models
from resblock_bench.bench.records import Cell
from resblock_bench.bench.tune import choices as tune_choices
from resblock_bench.kernels import tiers, tuned
from resblock_bench.kernels.tiers import Choice, Direction, Launch, Problem
from resblock_bench.kernels.tuned import Bucket


def published_problems() -> Iterator[tuple[Direction, Problem]]:
    for (C, HW), N, channels_last, size, direction in itertools.product(
        [(C, HW) for C, HW, _ in weighted_sites()], (1, 64), (False, True), (2, 4), DIRECTIONS
    ):
        yield direction, Problem(N, C, HW, 32, channels_last, size)


def work_of(how: Launch, HW: int) -> tuple[object, ...]:
    """What distinguishes a launch from another: C and D differ in their sizes alone."""
    tier = "C" if how.split else how.tier
    return tier, how.slab, how.block_c, how.block_hw, min(how.chunk, HW), how.lag, how.num_warps


def test_every_published_norm_has_candidates_the_rules_first() -> None:
    for direction, problem in published_problems():
        found = tune_choices.candidates(direction, problem, H100)
        launches = [tiers.shape(direction, problem, H100, choice) for choice in found]
        rules = tiers.plan_launch(direction, problem, H100)
        assert launches[0] == rules._replace(reason=launches[0].reason)
        assert len(found) <= 30
        assert all(how.num_warps in (1, 2, 4, 8, 16) for how in launches)
        assert all(not how.split or how.parts > 1 for how in launches[1:])
        assert len({work_of(how, problem.HW) for how in launches}) == len(found)


def test_every_candidate_can_be_written_to_a_table_and_read() -> None:
    for direction, problem in published_problems():
        bucket = tuned.bucket_of(direction, problem)
        for choice in tune_choices.candidates(direction, problem, H100):
            fields = {"bucket": bucket, "time_us": 1.0, "rules_us": 1.0, **choice._asdict()}
            assert msgspec.convert(fields, tuned.Entry).choice == choice


def test_tiers_are_tried_where_they_make_sense() -> None:
    def tried(N: int, C: int, HW: int, channels_last: bool = False) -> str:
        problem = Problem(N, C, HW, 32, channels_last, 2)
        found = tune_choices.candidates("forward", problem, H100)
        return "".join(sorted({choice.tier for choice in found}))

    assert tried(64, 256, 64) == "A"  # one tile is the whole unit, and B what A is, read twice
    assert tried(64, 256, 1024) == "AB"
    assert tried(1, 256, 1024) == "AC"  # 32 units leave most of the GPU idle
    assert tried(8, 256, 65536) == "BC"  # D would launch as C does
    assert tried(8, 256, 65536, channels_last=True) == "D"  # a call that L2 does not hold
    assert tried(1, 256, 2048 * 2048) == "D"  # no group fits in L2
    # Nor a sample in 32 bits, as B has it.
    assert tried(8, 256, 2896 * 2897, channels_last=True) == "D"


def test_the_shapes_of_a_divided_unit() -> None:
    problem = Problem(1, 256, 2048 * 2048, 32, False, 2)
    rules, *others = tune_choices.candidates("forward", problem, H100)
    assert rules == Choice("D", 4096, 8, 4, 4)
    assert set(others) == {
        *(Choice("D", *shape) for shape in ((2048, 4, 8, 8), (2048, 2, 8, 8), (4096, 4, 4, 4))),
        *(Choice("D", *shape) for shape in ((8192, 16, 2, 2), (8192, 8, 2, 2))),
        *(rules._replace(waves=w, tiles=t) for w in (2, 4, 8) for t in (1, 4, 16)),
    } - {rules}
    # None of the four axes is lost on the way to the launch.
    launches = [tiers.shape("forward", problem, H100, choice) for choice in (rules, *others)]
    assert {how.block_hw for how in launches} == {2048, 4096, 8192}
    assert {how.num_warps for how in launches if how.block_hw == 4096} == {4, 8}
    assert {how.tiles for how in launches if how.block_hw == 4096} == {1, 4, 16}
    assert len({how.lag for how in launches if how.tiles == 4 and how.num_warps == 8}) == 3
    # Where a part cannot be longer than a channel, more tiles a part are none.
    problem = Problem(8, 256, 4096, 32, False, 2)
    assert tiers.plan_launch("forward", problem, H100, "C").splits == 1
    divided = [c for c in tune_choices.candidates("forward", problem, H100) if c.tier in "CD"]
    assert len({(choice.tile, choice.warps, choice.waves) for choice in divided}) == len(divided)


def test_an_earlier_choice_comes_after_the_rules() -> None:
    known = Choice("B", 16, 1)
    assert tune_choices.candidates("forward", PROBLEM, SMALL, known)[:2] == [choices()[0], known]
    same_as_rules = choices()[0]._replace(waves=7)  # which tier A does not read
    assert tune_choices.candidates("forward", PROBLEM, SMALL, same_as_rules) == choices()
    too_large = Choice("A", 4096, 4)
    large = Problem(8, 256, 65536, 32, False, 2)
    assert too_large not in tune_choices.candidates("forward", large, H100, too_large)


def test_the_buckets_of_a_model_are_its_norms() -> None:
    works = tune_choices.buckets(tune_choices.select(["model=adm-imagenet64-cond", "batch=8"]))
    found = {(w.bucket.direction, w.problem.C, w.problem.HW) for w in works}
    with SHAPES.open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "adm-imagenet64-cond"]
    wanted = set()
    for row in rows:
        size = int(row["h"]) * int(row["w"])
        after = {"up": size * 4, "down": size // 4, "none": size}[row["updown"]]
        for direction in DIRECTIONS:
            wanted |= {(direction, int(row["c_in"]), size), (direction, int(row["c_out"]), after)}
    assert found == wanted and len(works) == len(wanted)
    assert {w.dtype for w in works} == {torch.bfloat16}
    assert all(w.bucket.groups == 256 and w.bucket.layout == "nchw" for w in works)
    weights = [w.weight for w in works]
    assert weights == sorted(weights, reverse=True)


def test_a_bucket_weighs_what_all_its_calls_move() -> None:
    arguments = ["channels=64", "resolution=8", "batch=5,8", "dtype=fp32"]
    works = tune_choices.buckets(tune_choices.select([*arguments, "impl=reference,fused"]))
    assert [w.bucket.direction for w in works] == ["backward", "forward"]
    # Two norms at each of two batches: 5·32 and 8·32 groups are both up to 256.
    numbers = 2 * (5 + 8) * 64 * 64
    assert [w.weight for w in works] == [3 * 4 * numbers, 2 * 4 * numbers]
    assert all(w.problem == Problem(8, 64, 64, 32, False, 4) for w in works)
    inference = tune_choices.buckets(tune_choices.select([*arguments, "mode=inference"]))
    assert [w.bucket.direction for w in inference] == ["forward"]


@pytest.mark.parametrize(
    ("changes", "second"),
    [
        ({}, (48, 64)),
        ({"updown": "up"}, (48, 256)),
        ({"updown": "down"}, (48, 16)),
        ({"dims": 3}, (48, 512)),
        ({"dims": 3, "updown": "up"}, (48, 2048)),  # never resampled is the outermost size
    ],
    ids=str,
)
def test_the_second_norm_is_over_what_the_first_convolution_returns(
    make_cell: Callable[..., Cell], changes: dict[str, Any], second: tuple[int, int]
) -> None:
    cell = make_cell(resolution=8, channels=32, out_channels=48, batch=3, **changes)
    assert tune_choices.norms(cell) == tuple(
        Problem(3, C, HW, 32, False, 4) for C, HW in ((32, 8**cell.dims), second)
    )


def test_a_single_position_is_nobodys_layout() -> None:
    one = ["channels=64", "batch=1", "layout=nhwc"]
    assert tune_choices.buckets(tune_choices.select([*one, "resolution=1"])) == []
    (forward,) = tune_choices.buckets(tune_choices.select([*one, "resolution=2", "mode=forward"]))
    assert forward.bucket == Bucket("forward", "nhwc", 2, 2, 4, 32)
    (cell,) = tune_choices.select([*one, "resolution=1", "mode=forward"])
    assert not tune_choices.norms(cell.cell)[0].channels_last


def test_what_is_measured_by_default() -> None:
    cells = [item.cell for item in tune_choices.select([])]
    assert {cell.model for cell in cells} == set(models())
    assert {(cell.dtype, cell.batch) for cell in cells} == {("bf16", 8), ("bf16", 64)}
    free = [item.cell for item in tune_choices.select(["channels=64", "dtype=fp32"])]
    assert {(cell.model, cell.channels, cell.dtype) for cell in free} == {(None, 64, "fp32")}


def test_choices_are_named_by_what_their_tier_reads() -> None:
    assert tune_choices.choice_name(Choice("A", 512, 4, 2)) == "A w4"
    assert tune_choices.choice_name(Choice("B", 512, 4, 2)) == "B 512 w4"
    assert tune_choices.choice_name(Choice("D", 512, 4, 3, 2)) == "D 512 w4 ×3 t2"
    assert tune_choices.choice_name(Choice("C", 512, 4, 3, 16)) == "C 512 w4 ×3 t16"
