"""The document: what was measured beside what was predicted, contradictions on top."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.gpu_rows import PREDICTED, SITE
from support.made_rows import CALM, HOT, within

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.fit.plans import MemoryPlan
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.training import Recipe
from resblock_bench.bench.fit.variant import VariantPlan
from resblock_bench.bench.gpu import report
from resblock_bench.bench.gpu.beside import (
    BesideOperator,
    contradictions,
    norm_of,
    predict_operators,
)
from resblock_bench.bench.gpu.operators import OperatorRow
from resblock_bench.bench.gpu.outcomes import StepOutcome, opened
from resblock_bench.bench.gpu.results import GpuResults, read_results
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.records import Environment, Row, cell_id
from resblock_bench.bench.runs.folder import Run, create_run

changed = msgspec.structs.replace
OUTCOME = StepOutcome(
    part=1, step="launches", status="ok", exit_code=0, seconds=1.0, sentence="16 are right",
    command=[], started_at="2026-11-26T12:00:00+00:00", machine="",
)  # fmt: skip


def results_of(**fields: object) -> GpuResults:
    given: dict[str, Any] = {
        "folder": Path("h100"),
        "outcomes": [OUTCOME],
        "machines": {},
        "operators": [],
        "runs": {},
        "plans": {},
        "calibrations": [],
        "notes": [],
        **fields,
    }
    return GpuResults(**given)


def text_of(results: GpuResults, operators: list[BesideOperator] | None = None) -> str:
    return "\n".join(report.document(results, operators or []))


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def sentences(beside: list[BesideOperator], **fields: object) -> list[str]:
    return [one.sentence for one in contradictions(results_of(**fields), beside)]


def test_an_empty_section_says_that_nothing_was_measured() -> None:
    text = text_of(results_of())
    for title in ("Blocks", "Whole models", "At equal memory", "Equal code"):
        assert section(text, title).strip() == "Nothing of this has been measured yet."
    assert "16 are right" in section(text, "Every step")


@pytest.mark.parametrize(
    ("median", "expected"), [(190.0, False), (230.0, False), (240.0, True), (140.0, True)]
)
def test_a_time_contradicts_a_prediction_beyond_its_margin(median: float, expected: bool) -> None:
    row = changed(SITE, median_us=median, low_us=median - 1, high_us=median + 1)
    found = sentences([BesideOperator(row, [], PREDICTED)])
    assert bool(found) is expected
    if expected:
        assert f"{median:,.1f} µs measured, 190.0 µs predicted" in found[0]


def test_someone_who_was_predicted_to_be_slower_and_is_faster_contradicts() -> None:
    faster = changed(SITE, impl="compiled", median_us=180.0, low_us=179.0, high_us=181.0)
    overlapping = changed(faster, high_us=199.0)
    assert "compiled takes 180.0 µs and fused 200.0, predicted 270.0 and 190.0" in str(
        sentences([BesideOperator(SITE, [faster], PREDICTED)])
    )
    assert sentences([BesideOperator(SITE, [overlapping], PREDICTED)]) == []
    assert sentences([BesideOperator(SITE, [faster], None)]) == []


def test_what_is_wrong_stands_before_what_is_slow() -> None:
    slow = changed(SITE, median_us=2000.0)
    wrong = changed(SITE, direction="backward", status="wrong", reason="dx is off", median_us=None)
    failed = changed(OUTCOME, status="failed", sentence="1 failed")
    found = sentences(
        [BesideOperator(slow, [], PREDICTED)], outcomes=[failed], operators=[slow, wrong]
    )
    assert found[0].startswith("launches failed: 1 failed")
    assert "dx is off" in found[1]
    assert "2,000.0 µs measured" in found[2]


def test_shares_of_the_floor_are_weighed_by_how_often_a_site_is_there() -> None:
    often = changed(SITE, weight=SITE.weight * 3, median_us=360.0)
    once = changed(SITE, resolution=128, weight=256 * 128**2, median_us=180.0)
    items = [BesideOperator(row, [], None) for row in (often, once)]
    text = section(text_of(results_of(), items), "The operator at published sites")
    # 12 times 180 of 360 µs, and once 180 of 180.
    assert f"**{(13 * 180) / (12 * 360 + 180):.0%}** of the floor" in text


def test_a_site_stands_beside_eager_compiled_and_the_best_peer() -> None:
    others = [
        changed(SITE, impl="eager", median_us=1700.0),
        changed(SITE, impl="compiled", median_us=300.0),
        changed(SITE, impl="liger", median_us=900.0),
        changed(SITE, impl="flag-gems", median_us=800.0),
        changed(SITE, impl="apex", status="failed", reason="no module | here", median_us=None),
    ]
    items = [BesideOperator(SITE, others, PREDICTED)]
    text = section(text_of(results_of(), items), "The operator at published sites")
    row = next(line for line in text.splitlines() if line.startswith("| 256 256² b8"))
    assert "1,700 | 300 | 800 flag-gems | 200 | 198–203 | 90% | C | 190 | 1.05" in row
    assert "apex failed: no module \\| here (1 row)" in text


def test_what_tuning_gains_is_by_site() -> None:
    rows = [SITE, changed(SITE, label="tuned", median_us=160.0)]
    text = section(text_of(results_of(operators=rows)), "The operator with tuned launches")
    assert "forward: 1.250 times as fast (1.25 to 1.25, 1 site)" in text


@pytest.fixture
def model_row(some_row: Callable[[str], Row]) -> Callable[..., Row]:
    """The row of a whole model, which nobody measured."""
    row = some_row("train")

    def make(impl: str, checkpoint: str, batch: int, images: float, **fields: object) -> Row:
        cell = changed(
            row.axes, workload="model", model="adm-imagenet64-cond", impl=impl, batch=batch,
            checkpoint=checkpoint, dtype="fp16",
        )  # fmt: skip
        assert row.memory is not None
        memory = changed(row.memory, peak_bytes=40 << 30, reserved_peak_bytes=50 << 30)
        given = {"throughput_images_per_s": images, "memory": memory, "conditions": CALM, **fields}
        found = changed(row, axes=cell, **given)
        return changed(found, id=cell_id(found.axes, found.contract, found.code))

    return make


def run_of(plan: Plan, found: Environment, *rows: Row) -> Run:
    return Run(Path("run"), plan, found, list(rows))


def test_models_stand_beside_table_7_and_at_equal_memory(
    plan: Plan, found: Environment, model_row: Callable[..., Row]
) -> None:
    run = run_of(
        plan, found,
        model_row("reference", "none", 32, 300.0),
        model_row("fused", "none", 32, 450.0),
        model_row("reference", "none", 96, 400.0),
        model_row("fused", "selective", 154, 1000.0),
    )  # fmt: skip
    text = text_of(results_of(runs={"table7": run}))
    seven = section(text, "Whole models beside ADM's table 7")
    assert "| adm-imagenet64-cond | 32 | 37.0 | 300.0 | 450.0 | – | 1.50 | 2.00 |" in seven
    equal = section(text, "At equal memory")
    assert "| adm-imagenet64-cond | fused/selective | 154 | 1,000.0 | 2.50 | 40.0 GiB |" in equal


def test_a_plan_stands_beside_what_the_allocator_held(
    plan: Plan, found: Environment, model_row: Callable[..., Row], tmp_path: Path
) -> None:
    peak = {"bytes": 41 << 30, "kinds": {}, "phase": "backward", "place": "", "places": {}}
    variant = msgspec.convert(
        {
            "recipe": msgspec.to_builtins(
                Recipe(impl="fused", checkpoint="none", precision="fp16", ema=True)
            ),
            "batch": 32,
            "peak": peak,
            "pieces": [],
            "confirmed_batch": 64,
            "cpu_s": 1.0,
            "resident_bytes": 1,
            "reserved_bytes": 40 << 30,
        },
        VariantPlan,
    )
    planned = MemoryPlan(
        subject=Subject(name="adm-imagenet64-cond"), batch=32, images_a_pass=32, devices=[],
        variants=[variant], failures=[], changes=[], interrupted=False, versions={}, commit=None,
        dirty=None,
    )  # fmt: skip
    own, other = model_row("fused", "none", 32, 1.0), model_row("fused", "none", 64, 1.0)
    results = results_of(runs={"table7": run_of(plan, found, own, other)}, plans={"p": planned})
    (line,) = [
        line
        for line in section(text_of(results), "plan beside the allocator").splitlines()
        if line.startswith("| adm")
    ]
    assert "41.0 GiB | 40.0 GiB | -2.4% | 40.0 GiB | 50.0 GiB | +25.0%" in line
    found_ = [one.sentence for one in contradictions(results, [])]
    assert ["reserved" in one for one in found_] == [True, False]  # the larger first


def test_twins_are_counted_apart_and_disturbed_ones_left_out(
    plan: Plan, found: Environment, some_row: Callable[[str], Row]
) -> None:
    row = some_row("train")
    twin = changed(row, axes=changed(row.axes, impl="twin"), conditions=CALM)
    rows = [
        changed(twin, ratio=within(1.0, 0.02), axes=changed(twin.axes, batch=2)),
        changed(twin, ratio=within(1.1, 0.02), axes=changed(twin.axes, batch=3)),
        changed(twin, ratio=within(9.0, 0.02), axes=changed(twin.axes, batch=4), conditions=HOT),
    ]
    results = results_of(runs={"twins": run_of(plan, found, *rows)})
    assert results.rows == []
    text = section(text_of(results), "Equal code")
    assert "of 2 blocks of the same code under two names the 95 % interval misses 1 in 1" in text
    assert "1 block more: disturbed" in text


def test_blocks_say_how_variants_stand_and_which_were_disturbed(
    plan: Plan, found: Environment, some_row: Callable[[str], Row]
) -> None:
    row = changed(some_row("train"), conditions=CALM)
    fused = changed(
        row,
        axes=changed(row.axes, impl="fused"),
        ratio=within(1.5),
        ratio_to_none=within(1.5),
        conditions=HOT,
    )
    oom = changed(fused, axes=changed(fused.axes, batch=99), status="oom", median_ms=None)
    results = results_of(runs={"a": run_of(plan, found, row, fused, oom)})
    text = section(text_of(results), "Blocks")
    assert "fused/none ! |" in text and "1.50 ±0.15" in text
    assert "fused/none | oom |" in text
    assert "`!`: disturbed" in text


def test_what_was_measured_is_read_back_and_what_is_damaged_is_a_note(
    tmp_path: Path, plan: Plan, found: Environment, some_row: Callable[[str], Row]
) -> None:
    with opened(tmp_path) as book:
        book.append(OUTCOME)
    with create_run(tmp_path / "runs/one", plan, found) as run:
        run.append(some_row("train"))
    with create_run(tmp_path / "runs/two", plan, found):
        pass
    (tmp_path / "runs/two/environment.json").write_text("{")
    (tmp_path / "plans/p.json").write_text("[]")
    (tmp_path / "operators.jsonl").write_bytes(
        msgspec.json.encode(SITE)
        + b"\n"
        + msgspec.json.encode(changed(SITE, direction="backward", status="begun"))
        + b"\n{"
    )
    results = read_results(tmp_path)
    assert list(results.runs) == ["one"] and results.plans == {}
    assert [row.status for row in results.operators] == ["ok", "begun"]
    (text,) = [one.sentence for one in contradictions(results, [])]
    assert "256 256² b8 bf16 nchw scale_shift backward, was begun and nothing came of it" in text
    assert len(results.notes) == 2
    assert "p.json was left out" in text_of(results)


def test_the_only_folder_of_results_needs_no_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"results of 0 machines \(none\): name one"):
        report.only_folder(tmp_path)
    for name in ("a", "b"):
        folder = tmp_path / "results/gpu" / name
        folder.mkdir(parents=True)
        (folder / "steps.jsonl").touch()
        if name == "a":
            assert report.only_folder(tmp_path) == folder
    with pytest.raises(UsageError, match="results of 2 machines"):
        report.only_folder(tmp_path)


def test_a_folder_without_outcomes_is_named(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = run_cli("gpu-report", tmp_path)
    assert code == 2
    assert "holds no results of a GPU" in err


def test_others_belong_to_the_fused_row_of_their_site_and_direction() -> None:
    rows: list[OperatorRow] = [
        SITE,
        changed(SITE, impl="eager"),
        changed(SITE, impl="eager", direction="backward"),
        changed(SITE, impl="eager", label="tuned"),
        changed(SITE, resolution=8, weight=1),
    ]
    found = predict_operators(rows, None)
    assert [item.row.resolution for item in found] == [256, 8]  # heaviest first
    assert found[0].others == [rows[1]] and found[1].others == []


def test_a_norm_is_predicted_as_it_was_called() -> None:
    norm = norm_of(SITE)
    assert (norm.batch, norm.channels, norm.positions, norm.groups) == (8, 256, 256**2, 32)
    assert not norm.bias_folded and norm.dropout == 0.0


def test_no_prediction_is_made_of_a_gpu_without_figures() -> None:
    from rich.console import Console

    (found,) = predict_operators([changed(SITE, device="NVIDIA Test")], Console(quiet=True))
    assert found.predicted is None
