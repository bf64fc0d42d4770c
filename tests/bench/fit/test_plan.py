from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.fit import plans
from resblock_bench.bench.fit.equal_memory import read_table, wanted
from resblock_bench.bench.fit.lifetimes import Peak
from resblock_bench.bench.fit.peaks import Piece
from resblock_bench.bench.fit.plans import MemoryPlan, PlanRequest, cheapest_change
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.training import Recipe
from resblock_bench.bench.fit.variant import VariantJob, VariantPlan, variant_plan
from resblock_bench.reference import PUBLISHED

BLOCK = ("plan", "-a", "channels=32", "-a", "resolution=16", "--batch", 4)


def test_a_block_that_fits_ends_with_0(
    run_cli: Callable, planned_here: list[bytes], tmp_path: Path
) -> None:
    json, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    done = run_cli(*BLOCK, "--ema", "--json", json, "--plot", plot)
    assert done.code == 0, done.err
    found = msgspec.json.decode(json.read_bytes(), type=MemoryPlan)
    assert len(found.variants) == len(planned_here) == 6  # and no variant was planned twice
    for plan in found.variants:
        assert plan.peak.bytes == sum(plan.peak.kinds.values()) == plan.peak_at(4)
        assert f"{plan.recipe.impl} {plan.recipe.checkpoint}" in done.out
    assert plot.stat().st_size > 10_000
    assert "32 16²: a training step of 4 images, fp32, AdamW, moving average" in done.out
    assert "16 GiB: fits as it is, with" in done.out
    assert "…" not in done.out


def test_what_does_not_fit_ends_with_1(run_cli: Callable, planned_here: list[bytes]) -> None:
    only = ("--impl", "reference", "--checkpoint", "none")
    done = run_cli(*BLOCK, "--batch", 4096, "--device-memory", "2MiB", *only)
    assert done.code == 1
    change = "fused, selective checkpointing, microbatches"
    assert f"2.0 MiB: the cheapest change is {change}" in done.out


def test_one_variant_that_fits_is_enough(run_cli: Callable, planned_here: list[bytes]) -> None:
    run_cli(*BLOCK, "--device-memory", "1GiB")
    found = {}
    for argument in planned_here:
        plan = variant_plan(msgspec.json.decode(argument, type=VariantJob))
        found[plan.recipe.impl, plan.recipe.checkpoint] = plan.peak.bytes
    limit = f"{found['fused', 'full']}B"
    assert found["fused", "full"] < found["reference", "none"]
    assert run_cli(*BLOCK, "--device-memory", limit).code == 0
    assert run_cli(*BLOCK, "--device-memory", limit, "--impl", "reference").code == 1


def test_a_variant_that_fails_ends_with_3(
    run_cli: Callable, planned_here: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("resblock_bench.bench.fit.training.Training._forget", fail)
    done = run_cli(*BLOCK, "--impl", "fused")
    assert done.code == 3
    assert "fused none: its step failed: RuntimeError: boom, in" in done.out


def test_an_interrupt_shows_what_there_is(
    run_cli: Callable, planned_here: list[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planner = plans.Planner.plan

    def plan(self: plans.Planner, recipe: Recipe) -> VariantPlan | None:
        if len(planned_here) == 2:
            raise KeyboardInterrupt
        return planner(self, recipe)

    monkeypatch.setattr(plans.Planner, "plan", plan)
    done = run_cli(*BLOCK, "--json", tmp_path / "plan.json")
    assert done.code == 3
    assert "reference selective" in done.out
    assert "interrupted: this is what there is so far" in done.out
    found = msgspec.json.decode((tmp_path / "plan.json").read_bytes(), type=MemoryPlan)
    assert (len(found.variants), found.interrupted) == (2, True)


@pytest.mark.slow
def test_variants_have_processes_of_their_own(run_cli: Callable) -> None:
    done = run_cli(*BLOCK, "--impl", "reference,fused", "--checkpoint", "none")
    assert done.code == 0, done.err
    assert "fused none" in done.out
    assert "[2/2]" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", 0], "--batch is 0: images a step are 1 to 65,536"),
        (["--batch", 65537], "--batch is 65537"),
        (["--microbatch", 9], "--microbatch is 9 and --batch 8"),
        (["--dtype", "fp8"], "unknown dtype 'fp8': it is one of published, fp32, bf16, fp16"),
        (["--optimizer", "sgd"], "unknown optimizer 'sgd': it is one of adamw, none"),
        (["--impl", "fusd"], "did you mean 'fused'"),
        (["--checkpoint", "some"], "unknown checkpoint mode 'some'"),
        (["--device-memory", "24"], "'24' is not a size"),
        (["--device-memory", "4KiB"], "devices have 1 MiB to 1048576 GiB"),
        (["--plot", "x.pdf"], "is no PNG or SVG by its name"),
        (["--json", "absent/x.json"], "absent/x.json cannot be written"),
        (["--published"], ": MODEL is fixed by --published"),
    ],
)
def test_bad_input_is_one_sentence_and_2(
    run_cli: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli("plan", "iddpm-cifar10-uncond", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def synthetic(job: Recipe, per_image: int, fixed: int = 100) -> VariantPlan:
    piece = Piece(fixed, per_image)
    peak = Peak(bytes=piece.at(8), kinds={}, phase="forward", place="", places={})
    return VariantPlan(
        recipe=job,
        batch=8,
        peak=peak,
        pieces=[piece],
        confirmed_batch=9,
        cpu_s=0.0,
        resident_bytes=0,
    )


def need_of(recipe: Recipe) -> VariantPlan:
    """100 bytes, 50 more with a moving average; 100 an image, less with each change."""
    per_image = {"none": 80, "selective": 50, "full": 20}[recipe.checkpoint]
    per_image = 100 if recipe.impl == "reference" else per_image
    if recipe.recompute_attention:
        per_image -= 10
    if recipe.precision == "bf16":
        per_image //= 2
    return synthetic(recipe, per_image, 150 if recipe.ema else 100)


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (950, ""),
        (949, "fused"),
        (789, "fused, selective checkpointing"),
        (549, "fused, selective checkpointing, attention computed again"),
        (469, "fused, full checkpointing"),
        (309, "fused, selective checkpointing, microbatches, 3 at a time"),
        (199, "fused, selective checkpointing, attention computed again, microbatches, "
              "1 at a time"),
        (189, "fused, full checkpointing, microbatches, 1 at a time"),
        (169, "fused, selective checkpointing, the moving average in main memory, microbatches, "
              "1 at a time"),
        (119, "fused, full checkpointing, the moving average in main memory, autocast to bf16, "
              "microbatches, 1 at a time"),
        (109, None),
    ],
)  # fmt: skip
def test_the_cheapest_change_that_fits_is_named(
    model: Callable[[str], Subject], capacity: int, expected: str | None
) -> None:
    request = PlanRequest(subject=model("unet"), precision="fp32", batch=8, ema=True)
    asked: list[Recipe] = []

    def plan(recipe: Recipe) -> VariantPlan:
        asked.append(recipe)
        return need_of(recipe)

    change = cheapest_change(request, capacity, plan)
    assert change.what == expected
    if change.peak_bytes is not None:
        assert change.peak_bytes <= capacity
    assert len(set(asked)) == len(asked)


def test_the_published_table_goes_on_where_it_was_interrupted(
    run_cli: Callable,
    planned_here: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    names = ("iddpm-cifar10-uncond", "adm-lsun256")
    monkeypatch.setattr(
        "resblock_bench.bench.fit.equal_memory.PUBLISHED", {n: PUBLISHED[n] for n in names}
    )
    stop = [7]

    def reply(self: plans.Planner, job: VariantJob) -> plans.VariantReply:
        planned_here.append(msgspec.json.encode(job))
        if len(planned_here) == stop[0]:
            raise KeyboardInterrupt
        return plans.VariantReply(plan=synthetic(job.recipe, 10**7))

    monkeypatch.setattr(plans.Planner, "_reply", reply)
    json, plot = tmp_path / "table.json", tmp_path / "table.svg"
    done = run_cli("plan", "--published", "--json", json)
    assert done.code == 3
    assert "interrupted: 6 variants are missing; the same command goes on" in done.out
    stop[0] = 0
    done = run_cli("plan", "--published", "--json", json, "--plot", plot)
    assert done.code == 0
    assert len(planned_here) == 7 + 6
    table = read_table(json)
    assert [(row.model, row.plan.recipe) for row in table.rows] == list(wanted())
    assert table.largest("adm-lsun256", "fused", "full", 16 * 2**30) == (16 * 2**30 - 100) // 10**7
    recipes = {row.model: row.plan.recipe for row in table.rows}
    assert recipes["adm-lsun256"].recompute_attention
    assert recipes["adm-lsun256"].precision == "fp16"
    assert "adm-lsun256" in plot.read_text()


def test_a_damaged_table_is_not_overwritten(run_cli: Callable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    done = run_cli("plan", "--published", "--json", path)
    assert done.code == 2
    assert "is damaged" in done.err
    assert path.read_text() == "{"
