import itertools
import re
import statistics
from collections.abc import Callable

import msgspec
import pytest
import torch
from support.orders import SIX, Given
from torch import Tensor, nn

from resblock_bench.bench.measure import cell as measuring
from resblock_bench.bench.measure import orders
from resblock_bench.bench.measure.cell import Task, contract_of, id_of
from resblock_bench.bench.measure.implementations import IMPLEMENTATIONS
from resblock_bench.bench.measure.stats import median_interval
from resblock_bench.bench.measure.workload import unsupported
from resblock_bench.bench.records import Cell, Row, cell_id


def test_a_row_is_self_describing(
    measure: Callable[..., Row], make_task: Callable[..., Task]
) -> None:
    row = measure(batch=3)
    assert row.status == "ok"
    assert row.axes.batch == 3
    assert row.contract == contract_of(make_task(batch=3))
    assert row.id == cell_id(row.axes, row.contract, row.code)
    assert row.versions["torch"] == torch.__version__
    assert row.started_at.endswith("+00:00")


def test_the_numbers_of_a_row_follow_from_its_samples(measure: Callable[..., Row]) -> None:
    row = measure(batch=3)
    assert row.samples_ms is not None
    assert len(row.samples_ms) == 6
    assert row.median_ms == statistics.median(row.samples_ms)
    assert (row.ci_low_ms, row.ci_high_ms) == median_interval(row.samples_ms, 0.95)
    assert row.throughput_images_per_s == pytest.approx(3 / (row.median_ms / 1000))


def test_the_contract_says_what_the_mode_s_step_contains(
    make_task: Callable[..., Task],
) -> None:
    steps = {
        mode: contract_of(make_task(mode=mode)).step for mode in ("inference", "forward", "train")
    }
    assert "no_grad" in steps["inference"]
    assert "backward" not in steps["forward"]
    assert "backward(cotangent)" in steps["train"]


def test_a_cell_takes_its_turns_as_ordered(
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    add_implementation: Callable[..., None],
) -> None:
    seen: list[float] = []

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        seen.append(float(emb.double().sum()))
        out: Tensor = module(x, emb)
        return out

    add_implementation("seen", around)
    began: list[int] = []
    given = [orders.Read(), orders.Burst(60.0, 3), orders.Redraw(), orders.Burst(0.0)]
    given += [orders.Burst(60.0, 2), orders.Read(), orders.Finish("time")]
    channel = Given(given, lambda order: began.append(len(seen)))
    row = measure_task(make_task(impl="seen", mode="inference"), channel)
    assert (row.status, row.rounds, row.stop_rule) == ("ok", [3, 1, 2], "time")
    assert [type(answer).__name__ for answer in channel.answers] == [
        "Ready", "Counters", "Samples", "Ready", "Samples", "Samples", "Counters",
    ]  # fmt: skip
    told = [a.samples_ms for a in channel.answers if isinstance(a, orders.Samples)]
    assert [ms for burst in told for ms in burst] == row.samples_ms
    assert channel.phases == ["check", "memory", "timing", "last check"]
    # With new inputs a step comes before those that count.
    steps = [after - before for before, after in itertools.pairwise(began)]
    assert steps == [0, 3, 1, 1, 2, 0]
    assert len(set(seen[began[1] :])) == len(seen[began[1] :])  # never the same inputs twice


def test_who_waits_for_a_turn_takes_no_time(
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does who waits to be told what to measure."""
    now_s = [0.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now_s[0])

    def wait(order: object) -> None:
        now_s[0] += 100.0
        channel.waited_s += 100.0
        now_s[0] += 0.5  # its turn

    channel = Given(SIX, wait)
    channel.waited_s = 1e6
    row = measure_task(make_task(mode="inference"), channel)
    assert row.status == "ok", row.reason
    assert row.wall_s == pytest.approx(0.5 * len(SIX))


def test_multiplicity_is_recorded_and_no_part_of_the_identity(
    measure: Callable[..., Row],
) -> None:
    rows = [measure(mode="inference", multiplicity=count) for count in (1, 7)]
    assert [row.multiplicity for row in rows] == [1, 7]
    assert rows[0].id == rows[1].id


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("first line\nsecond"), "failed", r"ValueError: first line \(line \d+ of"),
        (RuntimeError(), "failed", "RuntimeError: no message"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "OutOfMemoryError"),
        (MemoryError("no more"), "oom", "MemoryError"),
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: ..."), "oom", "allocate"),
    ],
    ids=["error", "silent", "gpu", "python", "cpu"],
)
def test_an_exception_becomes_a_status_with_its_reason(
    measure: Callable[..., Row],
    add_implementation: Callable[..., None],
    error: Exception,
    status: str,
    reason: str,
) -> None:
    def fail(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        raise error

    add_implementation("failing", fail)
    row = measure(impl="failing")
    assert row.status == status
    assert re.search(reason, row.reason or "")
    assert row.samples_ms is None


def test_what_was_measured_before_an_exception_stays_in_the_row(
    measure: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the timer broke")

    monkeypatch.setattr(measuring, "Sampler", fail)
    row = measure(mode="inference")
    assert row.status == "failed"
    assert (row.reason or "").startswith("RuntimeError: the timer broke (line")
    assert row.correctness is not None
    assert row.memory is not None
    assert row.samples_ms is None


def test_an_interrupt_is_not_swallowed(
    measure: Callable[..., Row], add_implementation: Callable[..., None]
) -> None:
    def interrupt(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        raise KeyboardInterrupt

    add_implementation("interrupted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(impl="interrupted")


def test_a_cell_that_torch_does_not_have_is_skipped(measure: Callable[..., Row]) -> None:
    row = measure(layout="nhwc", dims=1)
    assert (row.status, row.samples_ms) == ("skipped", None)
    assert "one spatial dimension" in (row.reason or "")


def test_the_seed_decides_the_inputs(measure: Callable[..., Row]) -> None:
    first, second = (measure(mode="inference", seed=seed) for seed in (0, 1))
    assert first.id != second.id
    assert first.correctness is not None
    assert second.correctness is not None
    assert first.correctness.errors != second.correctness.errors


@pytest.mark.parametrize(
    "change", [{"batch": 3}, {"dtype": "bf16"}, {"impl": "fused"}, {"model": "x"}], ids=str
)
def test_the_id_depends_on_every_axis(
    make_task: Callable[..., Task], change: dict[str, object]
) -> None:
    assert id_of(make_task(**change)) != id_of(make_task())


def test_the_id_depends_on_contract_and_code(
    make_task: Callable[..., Task], make_cell: Callable[..., Cell]
) -> None:
    contract = contract_of(make_task())
    ids = {cell_id(make_cell(), contract, "c"), cell_id(make_cell(), contract, "d")}
    for field in ("threads", "max_samples", "min_samples"):
        ids.add(cell_id(make_cell(), msgspec.structs.replace(contract, **{field: 77}), "c"))
    assert len(ids) == 5


def test_the_id_is_stable_between_processes_and_releases(make_cell: Callable[..., Cell]) -> None:
    """Stored baselines are found by id: a change here is a change of the schema version."""
    from resblock_bench.bench.records import SCHEMA_VERSION, Contract

    contract = Contract(
        device="cpu",
        timer="perf_counter",
        threads=2,
        warmup_s=0.1,
        warmup_max_s=1.0,
        warmup_min_steps=2,
        steady=0.02,
        burst_s=0.1,
        gap_s=0.01,
        confidence=0.95,
        rel_half_width=0.02,
        min_samples=8,
        max_samples=1000,
        max_time_s=1.0,
        l2="not flushed",
        backend="default",
        seed=0,
        step="step",
        precision="precision",
        inputs="inputs",
        turns="turns",
    )
    assert (SCHEMA_VERSION, cell_id(make_cell(), contract, "code")) == (3, "2927d53f6dc7bbf3")


def test_results_that_are_not_finite_are_said_to_be_so(
    measure: Callable[..., Row], add_implementation: Callable[..., None]
) -> None:
    add_implementation("infinite", lambda module, x, emb: module(x, emb) / 0)
    row = measure(impl="infinite", mode="inference")
    assert row.status == "wrong"
    assert "relative error NaN or infinite is above its limit" in str(row.reason)


def test_a_norm_over_a_single_value_is_refused_as_pytorch_does(
    make_cell: Callable[..., Cell],
) -> None:
    single = make_cell(resolution=1, batch=1)
    assert "norm over a single value" in str(unsupported(single))
    down = msgspec.structs.replace(single, resolution=2, updown="down")
    assert "norm over a single value" in str(unsupported(down))
    for fine in ({"batch": 2}, {"resolution": 2}, {"channels": 64, "out_channels": 64}):
        cell = msgspec.structs.replace(single, **fine)
        assert unsupported(cell) is None
        block = IMPLEMENTATIONS["reference"].build(cell)
        block(
            torch.ones(cell.batch, cell.channels, *[cell.resolution] * 2),
            torch.ones(cell.batch, 16),
        )
    block = IMPLEMENTATIONS["reference"].build(single)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.ones(1, 32, 1, 1), torch.ones(1, 16))
