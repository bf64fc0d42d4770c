import math
import typing
from collections.abc import Callable

import pytest
from msgspec.structs import replace
from rich.console import Console

from resblock_bench.bench.records import Floor, Ratio, Row, Status
from resblock_bench.bench.runs.table import (
    WIDTH,
    disturbed,
    mean_interval,
    problems,
    ratio_text,
    results_table,
    summary,
)


def shown(rows: list[Row], width: int = WIDTH) -> str:
    console = Console(width=width, record=True, force_terminal=False, file=None, quiet=False)
    with console.capture() as capture:
        console.print(results_table(rows, width))
    return capture.get()


def of(value: float, half: float | None = None) -> Ratio:
    """A ratio with half its interval on the log scale."""
    if half is None:
        return Ratio(value=value, low=None, high=None)
    return Ratio(value=value, low=value * math.exp(-half), high=value * math.exp(half))


@pytest.fixture
def make_row(some_row: Callable[[str], Row]) -> Callable[..., Row]:
    """A measured row with another cell, median and ratio, on a machine that did nothing else."""
    base = some_row("inference")

    def make(
        median_ms: float | None,
        status: str = "ok",
        ratio: Ratio | None = None,
        disturbances: typing.Sequence[str] = (),
        **axes: object,
    ) -> Row:
        cell = replace(base.axes, **axes)
        changes: dict[str, object] = {"axes": cell, "status": status, "median_ms": median_ms}
        if median_ms is None:
            changes |= {"throughput_images_per_s": None, "reason": f"why {status}"}
        else:
            changes["throughput_images_per_s"] = cell.batch / median_ms * 1e3
            changes |= {"ci_low_ms": median_ms * 0.9, "ci_high_ms": median_ms * 1.1}
        row = replace(base, ratio=ratio, **changes)
        return replace(row, conditions=a_machine(disturbances))

    return make


def a_machine(disturbances: typing.Sequence[str]) -> object:
    from resblock_bench.bench.measure.conditions import conditions
    from resblock_bench.bench.measure.telemetry import Reading

    before, after = (Reading(t_s=float(t)) for t in (0, 1))
    found = conditions(before, after, source="test", images=1, threads=1)
    return replace(found, disturbances=list(disturbances))


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if name in line]
    return line


def test_the_ratio_of_its_rounds_is_shown_with_its_interval(make_row: Callable[..., Row]) -> None:
    """Whatever the medians say, which the machine moved meanwhile."""
    rows = [
        make_row(10.0, ratio=of(1.0, 0.0)),
        make_row(10.0, impl="fused", ratio=Ratio(value=1.25, low=1.22, high=1.28)),
        make_row(10.0, impl="fused", checkpoint="full", ratio=of(0.5)),
        make_row(10.0, impl="fused", checkpoint="selective"),
    ]
    text = shown(rows)
    assert "1.25 ±0.03" in line_of(text, "fused none")
    assert "0.50" in line_of(text, "fused full")
    assert "±0.0" not in line_of(text, "fused full")
    assert "±0.0" not in line_of(text, "reference none")


def test_half_the_interval_stands_behind_a_ratio() -> None:
    assert ratio_text(Ratio(value=1.116, low=1.05, high=1.11)) == "1.12 ±0.03"
    assert ratio_text(of(1.116)) == "1.12"


@pytest.mark.parametrize("status", [s for s in typing.get_args(Status) if s != "ok"])
def test_what_was_not_measured_has_its_status(make_row: Callable[..., Row], status: str) -> None:
    rows = [make_row(10.0), make_row(None, status, ratio=of(3.0, 0.1), impl="fused")]
    line = line_of(shown(rows), "fused none")
    assert status in line
    assert "3.00" not in line


def test_the_longest_rows_fit_the_width(make_row: Callable[..., Row]) -> None:
    long = {
        "model": "iddpm-upsample-64-256-cond",
        "channels": 1024,
        "out_channels": 1536,
        "resolution": 512,
        "batch": 2048,
        "updown": "down",
        "dropout": 0.125,
        "conditioning": "add",
    }
    rows = [
        make_row(0.001, checkpoint="selective", **long),
        make_row(
            1e6, impl="reference_of_a_long_name", ratio=of(12.5, 0.05), checkpoint="selective",
            **long,
        ),
    ]  # fmt: skip
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "2,048,000,000.0" in text
    assert "12.50 ±0.63" in text


def test_memory_and_error_stand_in_the_table(make_row: Callable[..., Row]) -> None:
    row = make_row(10.0)
    assert row.memory is not None
    memory = replace(
        row.memory, peak_above_baseline_bytes=3 * 2**20, saved_for_backward_bytes=2**19
    )
    text = shown([replace(row, memory=memory)])
    assert "3.00" in text
    assert "0.50" in text
    assert "e-0" in text


def test_problems_are_grouped_with_their_reason(make_row: Callable[..., Row]) -> None:
    rows = [make_row(1.0), make_row(None, "oom"), make_row(None, "oom", batch=3)]
    assert problems(rows) == ["oom: reference, 2 cells: why oom"]


def test_the_summary_counts_and_shows_the_mean_with_its_interval_and_the_range(
    make_row: Callable[..., Row],
) -> None:
    rows = [
        make_row(10.0, ratio=of(1.0, 0.0)),
        make_row(5.0, impl="fused", ratio=of(2.0, 0.3)),
        make_row(10.0, batch=3, ratio=of(1.0, 0.0)),
        make_row(20.0, impl="fused", batch=3, ratio=of(0.5, 0.4)),
        make_row(None, "oom", impl="fused", batch=4),
    ]
    text = summary(rows, 7)
    assert text.startswith("5 of 7 cells: 4 ok, 1 oom; ")
    # √(0.3² + 0.4²) / 2 = 0.25
    assert "fused runs at 1.00× the reference, 0.78–1.28 with 95 % (0.50–2.00 over 2 of 3" in text
    assert "left out" not in text


def test_the_interval_of_a_mean_narrows_with_its_number() -> None:
    low, high = mean_interval([of(1.5, 0.2)] * 4) or (0, 0)
    assert (low, high) == pytest.approx((1.5 * math.exp(-0.1), 1.5 * math.exp(0.1)))
    assert mean_interval([of(1.5, 0.2), of(1.5)]) is None


def test_a_mean_without_interval_says_so_by_having_none(make_row: Callable[..., Row]) -> None:
    text = summary([make_row(5.0, impl="fused", ratio=of(2.0))])
    assert "fused runs at 2.00× the reference (2.00–2.00 over 1 of 1 cell)" in text


def test_disturbed_cells_are_left_out_of_the_mean_and_counted(make_row: Callable[..., Row]) -> None:
    hot = ["the heat held the clocks back"]
    rows = [
        make_row(5.0, impl="fused", ratio=of(2.0, 0.1)),
        make_row(5.0, impl="fused", ratio=of(41.0, 0.1), batch=3, disturbances=hot),
        make_row(5.0, impl="fused", ratio=of(0.1, 0.1), batch=4, disturbances=hot),
    ]
    text = summary(rows)
    assert "fused runs at 2.00× the reference, 1.81–2.21 with 95 %" in text
    assert "2 disturbed ones left out" in text


def test_where_all_are_disturbed_nothing_is_said(make_row: Callable[..., Row]) -> None:
    hot = ["the heat held the clocks back"]
    rows = [
        make_row(5.0, impl="fused", ratio=of(2.0, 0.1), disturbances=hot),
        make_row(None, "crashed", impl="fused", batch=3),
    ]
    text = summary(rows)
    assert "nothing is said of fused: all of its 2 cells were disturbed or failed" in text
    assert "fused runs at" not in text


def test_what_took_no_turns_with_its_reference_compares_with_none(
    make_row: Callable[..., Row],
) -> None:
    rows = [make_row(10.0, ratio=of(1.0, 0.0)), make_row(5.0, impl="fused", batch=3)]
    assert "fused compares with no reference" in summary(rows)


def test_each_implementation_has_its_own_mean(make_row: Callable[..., Row]) -> None:
    rows = [make_row(5.0, impl=name, ratio=of(x)) for name, x in (("fused", 2.0), ("mine", 3.0))]
    text = summary(rows)
    assert "fused runs at 2.00×" in text
    assert "mine runs at 3.00×" in text


def test_a_disturbed_cell_is_marked_and_told(make_row: Callable[..., Row]) -> None:
    calm = make_row(10.0)
    shaken = make_row(5.0, impl="fused", disturbances=["others took 1.5 CPUs"])
    assert disturbed([calm]) is None
    assert "fused none !" in shown([calm, shaken])
    assert "reference none !" not in shown([calm, shaken])
    text = disturbed([calm, shaken]) or ""
    assert text.startswith("! 1 of 2 cells were disturbed")
    assert "others took 1.5 CPUs" in text


def test_the_share_of_the_floor_is_shown(make_row: Callable[..., Row]) -> None:
    floor = Floor(bytes=1, flops=1, bytes_ms=0.1, flops_ms=0.2, share=0.37)
    assert "37%" in shown([replace(make_row(10.0), floor=floor)])


def test_a_name_is_no_markup(make_row: Callable[..., Row]) -> None:
    row = make_row(10.0, impl="[/] [bold]x")
    assert "[/] [bold]x none" in shown([row])


@pytest.mark.parametrize("width", [20, 40, 60])
def test_names_stay_on_a_narrow_terminal(make_row: Callable[..., Row], width: int) -> None:
    assert "reference" in shown([make_row(10.0)], width)


def test_one_cell_is_not_many(make_row: Callable[..., Row]) -> None:
    assert summary([make_row(10.0)]).startswith("1 cell: 1 ok")
    assert summary([make_row(10.0)], 1).startswith("1 of 1 cell: 1 ok")


def test_a_channels_last_block_says_which_torch_its_baseline_is(
    make_row: Callable[..., Row],
) -> None:
    """PyTorch's own group norm of that layout differs by its version."""
    rows = [replace(make_row(10.0, layout="nhwc"), versions={"torch": "2.99.1"}), make_row(5.0)]
    text = shown(rows)
    assert "fp32 nhwc inference" in text
    assert " torch 2.99.1 " in text
    assert text.count("torch") == 1


MODEL = {"model": "iddpm-cifar10-uncond", "workload": "model"}


def test_the_share_of_a_model_s_step_that_its_blocks_are_is_shown(
    make_row: Callable[..., Row],
) -> None:
    blocks = {**MODEL, "workload": "blocks"}
    rows = [
        make_row(10.0, **MODEL),
        make_row(8.0, impl="fused", **MODEL),
        make_row(7.0, **blocks),
        make_row(6.0, impl="fused", **blocks),
        make_row(5.0, batch=5, **blocks),
    ]
    text = shown(rows)
    assert "reference none, 70% of step" in text
    assert "fused none, 75% of step" in text
    assert text.count("of step") == 2, "no share of a step that was not measured"
    parts = {**MODEL, "batch": 5, "microbatch": 1}
    assert "reference none, 50% of step" in shown([*rows, make_row(10.0, **parts)])
    failed = [make_row(None, "failed", **MODEL), make_row(7.0, **blocks)]
    assert "of step" not in shown(failed)


def test_the_share_of_the_matrix_rate_is_shown_of_whole_models(
    make_row: Callable[..., Row],
) -> None:
    floor = Floor(bytes=1, flops=1, bytes_ms=9.0, flops_ms=2.0, share=0.9)
    rows = [replace(make_row(10.0, **MODEL), floor=floor), replace(make_row(10.0), floor=floor)]
    text = shown(rows)
    assert "reference none, MFU 20%" in text
    assert text.count("MFU") == 1


def test_a_model_stands_for_itself_alone(make_row: Callable[..., Row]) -> None:
    text = shown([make_row(10.0, **MODEL)])
    assert "in the model" not in text
    assert "whole" in text


def test_models_and_blocks_have_means_of_their_own(make_row: Callable[..., Row]) -> None:
    rows = [
        make_row(5.0, impl="fused", ratio=of(2.0, 0.1)),
        make_row(5.0, impl="fused", ratio=of(3.0, 0.1), **MODEL),
    ]
    text = summary(rows)
    assert "blocks: fused runs at 2.00×" in text
    assert "whole models: fused runs at 3.00×" in text
    assert "whole models" not in summary(rows[1:])
