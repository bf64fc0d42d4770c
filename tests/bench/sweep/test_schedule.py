from collections.abc import Callable
from concurrent.futures import Future
from itertools import chain, repeat

import pytest
from msgspec.structs import replace

from resblock_bench.bench.measure.cell import Task, row_of
from resblock_bench.bench.records import Row, Status
from resblock_bench.bench.sweep.engines import Block
from resblock_bench.bench.sweep.schedule import OomRecord, blocks_of, run_blocks
from resblock_bench.bench.sweep.sweep import missing


class Instant:
    """An engine that answers at once, with the status that it was told for a batch size."""

    def __init__(self, lanes: int = 1, **statuses: Status) -> None:
        self.lanes = lanes
        self.statuses = statuses
        self.seen: list[list[int]] = []

    def rows(self, block: Block) -> list[Row]:
        return [row_of(t, self.statuses.get(f"b{t.cell.batch}", "ok")) for t in block]

    def submit(self, block: Block) -> Future[list[Row]]:
        self.seen.append([task.cell.batch for task in block])
        future: Future[list[Row]] = Future()
        future.set_result(self.rows(block))
        return future

    def close(self) -> None:
        pass


class Manual(Instant):
    """An engine whose blocks end when the test says so."""

    def __init__(self, lanes: int) -> None:
        super().__init__(lanes)
        self.running: list[tuple[Block, Future[list[Row]]]] = []

    def submit(self, block: Block) -> Future[list[Row]]:
        future: Future[list[Row]] = Future()
        self.running.append((block, future))
        if len(self.running) == self.lanes:
            self.end_last()
        return future

    def end_last(self) -> None:
        block, future = self.running.pop()
        future.set_result(self.rows(block))


@pytest.fixture
def tasks(make_task: Callable[..., Task]) -> list[Task]:
    return [make_task(batch=batch) for batch in (1, 2, 3, 4)]


def batches(rows: list[Row]) -> list[int]:
    return [row.axes.batch for row in rows]


def test_rows_come_in_order_and_only_when_asked_for(tasks: list[Task]) -> None:
    engine = Instant()
    rows = run_blocks(blocks_of(tasks), engine, oom=None)
    assert next(rows).axes.batch == 1
    assert engine.seen == [[1]]
    assert batches(list(rows)) == [2, 3, 4]


def test_an_engine_is_kept_busy_and_rows_come_as_they_end(tasks: list[Task]) -> None:
    engine = Manual(lanes=2)
    rows = run_blocks(blocks_of(tasks), engine, oom=None)
    assert [next(rows).axes.batch for _ in range(3)] == [2, 3, 4]
    engine.end_last()
    assert batches(list(rows)) == [1]


def test_a_budget_ends_the_run_between_two_blocks(tasks: list[Task]) -> None:
    engine = Instant()
    rows = run_blocks(
        blocks_of(tasks), engine, oom=None, budget_s=15, clock=lambda: 10 * len(engine.seen)
    )
    assert batches(list(rows)) == [1, 2]


def test_what_is_under_way_when_the_budget_is_spent_still_yields_its_rows(
    tasks: list[Task],
) -> None:
    engine = Manual(lanes=2)
    times = chain([0, 0, 0], repeat(100))
    rows = run_blocks(blocks_of(tasks), engine, oom=None, budget_s=15, clock=lambda: next(times))
    assert next(rows).axes.batch == 2
    engine.end_last()
    assert batches(list(rows)) == [1]


def test_a_clock_that_jumps_backwards_ends_nothing(tasks: list[Task]) -> None:
    times = iter([1000.0, 0.0, -5.0, 3.0, 2.0, 1.0, 0.0])
    rows = run_blocks(blocks_of(tasks), Instant(), oom=None, budget_s=15, clock=lambda: next(times))
    assert batches(list(rows)) == [1, 2, 3, 4]


def test_a_cell_that_cannot_be_measured_here_needs_no_engine(make_task: Callable) -> None:
    engine = Instant()
    tasks = [make_task(dims=1, layout="nhwc"), make_task()]
    assert [row.status for row in run_blocks(blocks_of(tasks), engine, oom=None)] == [
        "skipped",
        "ok",
    ]
    assert engine.seen == [[2]]


def test_larger_cells_of_a_series_that_ran_out_of_memory_are_skipped(tasks: list[Task]) -> None:
    engine = Instant(b2="oom")
    rows = list(run_blocks(blocks_of(tasks), engine, oom=OomRecord()))
    assert [row.status for row in rows] == ["ok", "oom", "skipped", "skipped"]
    assert engine.seen == [[1], [2]]
    assert "b2" in (rows[2].reason or "")
    assert "ran out of memory" in (rows[2].reason or "")


def test_the_record_can_be_ignored(tasks: list[Task]) -> None:
    rows = run_blocks(blocks_of(tasks), Instant(b2="oom"), oom=None)
    assert [row.status for row in rows] == ["ok", "oom", "ok", "ok"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"batch": 3}, True),
        ({"resolution": 16}, True),
        ({"out_channels": 64}, True),
        ({"model": "iddpm-cifar10-uncond"}, True),
        ({"batch": 1}, False),
        ({"batch": 3, "resolution": 4}, False),
        ({"channels": 64, "batch": 1}, False),
        ({"checkpoint": "full"}, False),
        ({"impl": "fused"}, False),
        ({"dtype": "bf16"}, False),
        ({"mode": "inference"}, False),
        ({"updown": "down"}, False),
    ],
    ids=str,
)
def test_what_counts_as_larger(
    make_task: Callable[..., Task], change: dict[str, object], expected: bool
) -> None:
    record = OomRecord([row_of(make_task(), "oom"), row_of(make_task(batch=1), "failed")])
    assert (record.verdict(make_task(**change).cell) is not None) == expected


def test_rows_that_were_not_handed_out_are_still_there(tasks: list[Task]) -> None:
    engine = Instant(lanes=3)
    running: dict[Future[list[Row]], Block] = {}
    rows = run_blocks(blocks_of(tasks), engine, oom=None, running=running)
    first = next(rows)
    rows.close()  # type: ignore[attr-defined]
    left = batches([row for future in running if future.done() for row in future.result()])
    assert first.axes.batch in left
    assert sorted(left) == [1, 2, 3]


@pytest.fixture
def variants(make_task: Callable[..., Task]) -> list[Task]:
    """Of two blocks in turn, as an axis of implementations before one of sizes would have them."""
    return [
        make_task(batch=batch, impl=impl, checkpoint=checkpoint)
        for impl, checkpoint in (("reference", "none"), ("fused", "none"), ("fused", "full"))
        for batch in (1, 2)
    ]


def test_the_variants_of_a_block_are_measured_together(variants: list[Task]) -> None:
    engine = Instant()
    began: list[int] = []
    blocks = blocks_of(variants)
    rows = run_blocks(blocks, engine, oom=None, began=lambda block: began.append(len(block)))
    assert batches(list(rows)) == [1] * 3 + [2] * 3
    assert engine.seen == [[1] * 3, [2] * 3]
    assert began == [3, 3]


def test_what_differs_in_more_than_the_variant_is_no_block(make_task: Callable[..., Task]) -> None:
    changes: list[dict[str, object]]
    changes = [{}, {"mode": "forward"}, {"dtype": "bf16"}, {"dropout": 0.1}, {"model": "m"}]
    tasks = [make_task(**change) for change in changes]
    assert blocks_of(tasks) == [[task] for task in tasks]


def test_of_a_block_that_cannot_be_measured_whole_the_rest_is(variants: list[Task]) -> None:
    """Where a fused variant ran out of memory, the larger one of the next block is left out."""

    class Tight(Instant):
        def rows(self, block: Block) -> list[Row]:
            oom = ("fused", "none")
            found = [(t.cell.impl, t.cell.checkpoint) for t in block]
            return [
                row_of(t, "oom" if v == oom else "ok") for t, v in zip(block, found, strict=True)
            ]

    engine = Tight()
    rows = list(run_blocks(blocks_of(variants), engine, oom=OomRecord()))
    assert engine.seen == [[1] * 3, [2] * 2]
    assert sorted((row.axes.batch, row.status) for row in rows) == [
        (1, "ok"), (1, "ok"), (1, "oom"), (2, "ok"), (2, "ok"), (2, "skipped"),
    ]  # fmt: skip


# What a resumption measures


@pytest.fixture
def block(make_task: Callable[..., Task]) -> list[Task]:
    variants = [("reference", "none"), ("reference", "full"), ("fused", "none"), ("fused", "full")]
    return [make_task(impl=impl, checkpoint=mode) for impl, mode in variants]


def asked_for(
    block: list[Task], found: dict[int, Row], **options: bool
) -> list[list[tuple[int, int]]]:
    """Of each block the tasks by number, with their attempts; `found` are the rows by number."""
    rows = {row.id: row for row in found.values()}
    todo = missing(block, rows, **{"retry": False, "ignore_oom": False, **options})
    cells = [task.cell for task in block]
    return [[(cells.index(task.cell), task.attempt) for task in one] for one in todo]


def test_a_whole_block_is_not_measured_again(block: list[Task]) -> None:
    for status in ("ok", "failed", "oom", "skipped", "wrong"):
        assert asked_for(block, {n: row_of(t, status) for n, t in enumerate(block)}) == []


def test_a_block_that_lacks_a_cell_is_measured_whole(block: list[Task]) -> None:
    rows = {n: row_of(task, "ok") for n, task in enumerate(block)}
    del rows[2]
    rows[1] = row_of(replace(block[1], attempt=3), "ok")
    assert asked_for(block, rows) == [[(0, 2), (1, 4), (2, 1), (3, 2)]]


@pytest.mark.parametrize("status", ["failed", "crashed", "timeout", "wrong", "impossible", "oom"])
def test_but_not_what_went_wrong_there(block: list[Task], status: Status) -> None:
    rows = {0: row_of(block[0], "ok"), 1: row_of(block[1], status), 3: row_of(block[3], "ok")}
    assert asked_for(block, rows) == [[(0, 2), (2, 1), (3, 2)]]
    again = [(0, 2), (1, 2), (2, 1), (3, 2)]
    assert asked_for(block, rows, ignore_oom=True, retry=status != "oom") == [again]


def test_what_failed_is_asked_for_on_request_with_all_that_was_measured(block: list[Task]) -> None:
    rows = {n: row_of(task, "ok") for n, task in enumerate(block)}
    rows[3], rows[1] = row_of(block[3], "failed"), row_of(block[1], "oom")
    assert asked_for(block, rows, retry=True) == [[(0, 2), (2, 2), (3, 2)]]
    assert asked_for(block, rows, ignore_oom=True) == [[(0, 2), (1, 2), (2, 2)]]


def test_blocks_are_asked_for_one_by_one(block: list[Task]) -> None:
    other = [replace(task, cell=replace(task.cell, batch=7)) for task in block]
    rows = {n: row_of(task, "ok") for n, task in enumerate([*block, *other]) if n != 5}
    assert asked_for([*block, *other], rows) == [[(4, 2), (5, 1), (6, 2), (7, 2)]]


def test_a_model_that_ran_out_of_memory_says_nothing_of_others(
    make_task: Callable[..., Task],
) -> None:
    whole = replace(make_task().cell, workload="model", model="adm-lsun256")
    ran_out = row_of(replace(make_task(), cell=whole), "oom", "why")
    record = OomRecord([ran_out])
    assert record.verdict(replace(whole, batch=whole.batch + 1)) is not None
    assert record.verdict(replace(whole, batch=whole.batch + 1, microbatch=1)) is None
    assert record.verdict(replace(whole, model="adm-imagenet256-uncond")) is None
    assert record.verdict(replace(whole, workload="blocks")) is None
