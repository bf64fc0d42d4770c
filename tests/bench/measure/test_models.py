"""Steps of whole models and of all their blocks, on tiny models of every kind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from support.models import CONFIGS, model_cell, register
from torch import Tensor, nn

from resblock_bench.bench.measure import models, networks
from resblock_bench.bench.measure.cell import Task, contract_of
from resblock_bench.bench.measure.correctness import check, compute_truth
from resblock_bench.bench.measure.floor import floor_of, matrix_share
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.measure.memory import TrackerMeter
from resblock_bench.bench.measure.models import ModelWorkload
from resblock_bench.bench.measure.predict_memory import MemoryOracle, predict_memory
from resblock_bench.bench.measure.scaled_memory import ScaledMemory
from resblock_bench.bench.measure.workload import unsupported
from resblock_bench.bench.records import Ceilings, Cell, Row
from resblock_bench.kernels import ResBlock as FusedBlock
from resblock_bench.reference import ResBlock, build, resblock_sites

CPU = torch.device("cpu")


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    register(monkeypatch, CONFIGS[request.param])
    return str(request.param)


@pytest.fixture
def unet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cell]:
    """Cells of a tiny U-Net."""
    register(monkeypatch, CONFIGS["unet"])
    return lambda **changes: model_cell(CONFIGS["unet"], **changes)


def drawn(cell: Cell) -> ModelWorkload:
    made = KINDS[cell.workload].drawn(cell, CPU, 0)
    assert isinstance(made, ModelWorkload)
    return made


@pytest.mark.parametrize("workload", ["model", "blocks"])
def test_the_truth_is_the_reference_in_float64(kind: str, workload: str) -> None:
    cell = model_cell(CONFIGS[kind], dropout=0.0, workload=workload)
    truth = compute_truth(cell, CPU, 0, 0).tensors
    model = build(networks.config_of(cell))
    preparation = KINDS[cell.workload]
    weights, inputs = preparation.draw_weights(cell, 0), preparation.draw_inputs(cell, CPU, 0)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    if workload == "model":
        model.load_state_dict(weights)
        model.double()
        target = inputs.pop("target")
        out = model(**inputs)
        encoder = CONFIGS[kind].family == "encoder"
        loss = F.cross_entropy(out, target) if encoder else F.mse_loss(out, target)
        loss.backward()
        expected = {"loss": loss.detach()}
        expected |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    else:
        shapes = networks.block_shapes(networks.config_of(cell))
        blocks = models.ResBlocks(model, [one.name for one in shapes])
        blocks.load_state_dict(weights)
        blocks.double()
        leaves = {n: t.requires_grad_() for n, t in inputs.items() if "cotangent" not in n}
        outs = [b(leaves[f"x {i}"], leaves["emb"]) for i, b in enumerate(blocks.blocks)]
        torch.autograd.backward(outs, [inputs[f"cotangent {i}"] for i in range(len(outs))])
        expected = {f"out {i}": out.detach() for i, out in enumerate(outs)}
        for name, leaf in {**leaves, **dict(blocks.named_parameters())}.items():
            expected[f"grad {name}"] = leaf.grad
    assert truth.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(truth[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("workload", ["model", "blocks"])
def test_every_variant_is_right(kind: str, workload: str) -> None:
    site = model_cell(CONFIGS[kind], dropout=0.0, workload=workload)
    truth = compute_truth(site, CPU, 0, 0)
    for impl in ("reference", "fused"):
        for checkpoint in ("none", "selective", "full"):
            made = drawn(replace(site, impl=impl, checkpoint=checkpoint))
            right, correctness = check(made.results(), truth)
            assert right, (impl, checkpoint, correctness.worst)
            assert len(correctness.errors) > len(list(made.block.parameters()))


def test_a_model_runs_the_blocks_of_its_implementation(unet: Callable[..., Cell]) -> None:
    def classes(cell: Cell) -> set[type[nn.Module]]:
        return {type(m) for m in drawn(cell).block.modules() if isinstance(m, ResBlock)}

    for workload in ("model", "blocks"):
        assert classes(unet(workload=workload)) == {ResBlock}
        assert classes(unet(workload=workload, impl="fused")) == {FusedBlock}


def test_all_blocks_of_a_model_are_run_as_often_as_they_are_there(kind: str) -> None:
    cell = model_cell(CONFIGS[kind], workload="blocks")
    sites = [
        (site.c_in, site.h, site.c_out)
        for site in resblock_sites(networks.config_of(cell))
        for _ in range(site.count)
    ]
    shapes = networks.block_shapes(networks.config_of(cell))
    assert [(x[0], x[1], out[0]) for _, x, out in shapes] == sites
    made = drawn(cell)
    xs = [t for name, t in made.inputs.items() if name.startswith("x ")]
    assert len({t.data_ptr() for t in xs}) == len(sites)


def test_a_training_step_updates_weights_and_average(unet: Callable[..., Cell]) -> None:
    made = drawn(unet(dropout=0.0))
    before = {name: p.detach().clone() for name, p in made.block.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(made._average, before.values(), strict=True))
    made.step()
    for (name, p), average in zip(made.block.named_parameters(), made._average, strict=True):
        assert p.grad is not None
        moved = p.detach() - before[name]
        touched = p.grad != 0
        assert torch.all(moved[touched] * p.grad[touched] <= 0), name
        assert 0 < moved.abs().max() <= 1.5 * models.LEARNING_RATE, name
        expected = before[name] + models.EMA_SHARE * moved
        torch.testing.assert_close(average, expected, msg=name)


def test_microbatches_have_the_gradients_of_the_whole_batch(unet: Callable[..., Cell]) -> None:
    whole = drawn(unet(batch=4, dropout=0.0)).results()
    for size in (1, 3):
        parts = drawn(unet(batch=4, dropout=0.0, microbatch=size)).results()
        assert parts.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(parts[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_microbatches_need_less_memory(unet: Callable[..., Cell]) -> None:
    peaks = [
        predict_memory(unet(batch=256, microbatch=size)).peak_bytes  # type: ignore[union-attr]
        for size in (None, 128)
    ]
    assert peaks[1] < peaks[0]


def test_a_sampling_step_is_ddim_s(unet: Callable[..., Cell]) -> None:
    made = drawn(unet(mode="inference"))
    found = made.results()
    assert found.keys() == {"out", "next"}
    x, noise = made.inputs["x"], found["out"][:, :3]
    image = (x - 0.5**0.5 * noise) / 0.5**0.5
    torch.testing.assert_close(found["next"], 0.6**0.5 * image + 0.4**0.5 * noise)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_models_of_16_bits_are_right(kind: str, dtype: str, mode: str) -> None:
    site = model_cell(CONFIGS[kind], dropout=0.0, dtype=dtype, mode=mode)
    truth = compute_truth(site, CPU, 0, 0)
    assert max(truth.limits.values()) < 0.3, "so lax that anything would pass"
    made = drawn(replace(site, impl="fused"))
    right, correctness = check(made.results(), truth)
    assert right, correctness.worst
    kept = {p.dtype for p in made.block.parameters()}
    assert kept == {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    if mode == "train":
        assert {t.dtype for t in (*made._masters, *made._average)} == {torch.float32}
        for p, master in zip(made.block.parameters(), made._masters, strict=True):
            assert torch.equal(p, master.to(p.dtype))


def test_channels_last_models_are_right(unet: Callable[..., Cell]) -> None:
    site = unet(dropout=0.0, layout="nhwc")
    right, correctness = check(
        drawn(replace(site, impl="fused")).results(), compute_truth(site, CPU, 0, 0)
    )
    assert right, correctness.worst
    weight = drawn(site).block.get_parameter("input_blocks.1.0.in_layers.2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def faulty(around: Callable[[nn.Module], None]) -> Callable[..., Any]:
    def model(module: nn.Module, checkpoint: str) -> nn.Module:
        around(module)
        return module

    return model


def lose_a_little(module: nn.Module) -> None:
    """Of the gradient that one block hands on."""
    block = next(m for m in module.modules() if isinstance(m, ResBlock))
    forward = block.forward

    def less(x: Tensor, emb: Tensor) -> Tensor:
        return forward(x * 0.999 + x.detach() * 0.001, emb)

    vars(block)["forward"] = less


def shift_a_little(module: nn.Module) -> None:
    block = next(m for m in module.modules() if isinstance(m, ResBlock))
    forward = block.forward
    vars(block)["forward"] = lambda x, emb: forward(x, emb) * (1 + 1e-4)


@pytest.mark.parametrize("fault", [lose_a_little, shift_a_little])
def test_a_seeded_fault_is_found_and_not_timed(
    unet: Callable[..., Cell],
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    add_implementation: Callable[..., None],
    fault: Callable[[nn.Module], None],
) -> None:
    add_implementation("wrong", model=faulty(fault))
    task = replace(make_task(), cell=unet(impl="wrong", dropout=0.0))
    row = measure_task(task)
    assert (row.status, row.samples_ms) == ("wrong", None)
    assert "above its limit" in (row.reason or "")


@pytest.mark.parametrize("workload", ["model", "blocks"])
@pytest.mark.parametrize("mode", ["train", "forward", "inference"])
def test_a_model_is_measured_like_a_block(
    unet: Callable[..., Cell],
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    workload: str,
    mode: str,
) -> None:
    """Its steps changed its weights and drew masks meanwhile: the last check has neither."""
    cell = unet(impl="fused", mode=mode, workload=workload)
    assert cell.dropout > 0
    row = measure_task(replace(make_task(), cell=cell))
    assert row.status == "ok", row.reason
    assert row.memory is not None
    assert row.memory.peak_bytes > row.memory.baseline_bytes > 0
    assert (row.memory.saved_for_backward_bytes > 0) == (mode != "inference")
    assert row.throughput_images_per_s == pytest.approx(2e3 / (row.median_ms or 0))


def test_dropout_is_off_for_the_check_alone(unet: Callable[..., Cell]) -> None:
    made = drawn(unet(dropout=0.5))
    weights = KINDS["model"].draw_weights(made.cell, 0)
    first = made.results()["loss"]
    with made.as_checked(weights) as plain:
        one = plain.results()["loss"]
    assert all(m.p == 0.5 for m in made.block.modules() if isinstance(m, nn.Dropout))
    with made.as_checked(weights) as plain:
        assert torch.equal(plain.results()["loss"], one), "the same weights, and no masks"
    assert not torch.equal(first, one)


def test_an_answer_that_is_kept_is_wrong_in_the_end(
    unet: Callable[..., Cell],
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    add_implementation: Callable[..., None],
) -> None:
    kept: list[Tensor] = []

    def model(module: nn.Module, checkpoint: str) -> Callable[..., Tensor]:
        def call(**arguments: Tensor) -> Tensor:
            if not kept:
                kept.append(module(**arguments))
            return kept[0].clone()

        return call

    add_implementation("cheat", model=model)
    cell = unet(impl="cheat", mode="inference", dropout=0.0)
    row = measure_task(replace(make_task(), cell=cell))
    assert row.status == "wrong"
    assert "with other inputs than at first" in (row.reason or "")


@pytest.mark.parametrize(
    ("workload", "impl", "mode"),
    [
        ("model", "fused", "train"),
        ("blocks", "reference", "train"),
        ("model", "fused", "inference"),
    ],
)
def test_the_predicted_memory_is_the_measured(
    unet: Callable[..., Cell], workload: str, impl: str, mode: str
) -> None:
    cell = unet(workload=workload, impl=impl, mode=mode, checkpoint="none")
    predicted = ScaledMemory([cell] * 9).memory(cell)
    measured = TrackerMeter().measure(drawn(cell))
    assert predicted is not None
    for name in ("baseline_bytes", "peak_bytes", "saved_for_backward_bytes"):
        assert getattr(predicted, name) == getattr(measured, name), name
    state = sum(p.numel() for p in build(CONFIGS["unet"]).parameters())
    kept = 4 * state * (4 if (workload, mode) == ("model", "train") else 1)
    if workload == "model":  # weights, two moments, the average
        assert kept <= predicted.baseline_bytes < 1.1 * kept


def test_variants_in_a_row_are_predicted_as_each_by_itself(unet: Callable[..., Cell]) -> None:
    """They share parameters and AdamW's states, whatever came before."""
    cells = [
        unet(impl=impl, checkpoint=checkpoint, dtype="bf16")
        for checkpoint, impl in (("none", "fused"), ("selective", "reference"), ("full", "fused"))
    ]
    oracle = MemoryOracle()
    assert [oracle.memory(cell) for cell in cells] == [predict_memory(cell) for cell in cells]


CEILINGS = Ceilings(
    copy_bytes_per_s=1e10, peak_bytes_per_s=1e10, matrix_flops_per_s={"fp32": 1e11, "fp16": 1e11}
)


def test_operations_are_those_of_the_model_three_times_in_training(
    unet: Callable[..., Cell],
) -> None:
    flops = {
        mode: floor_of(unet(mode=mode), CEILINGS, 1.0).flops for mode in ("inference", "train")
    }
    # All but the gradient of the image itself, and of what is embedded.
    assert 2.8 * flops["inference"] < flops["train"] < 3 * flops["inference"]
    blocks = floor_of(unet(workload="blocks"), CEILINGS, 1.0).flops
    assert 0.5 * flops["train"] < blocks < flops["train"]
    assert floor_of(unet(batch=4), CEILINGS, 1.0).flops == 2 * flops["train"]


def test_the_bytes_of_a_training_step_are_those_of_its_state(unet: Callable[..., Cell]) -> None:
    count = sum(p.numel() for p in build(CONFIGS["unet"]).parameters())
    assert floor_of(unet(), CEILINGS, 1.0).bytes == 2 * 4 * 4 * count
    inference = floor_of(unet(mode="inference"), CEILINGS, 1.0).bytes
    assert inference == 4 * count + 2 * 4 * 2 * 3 * 8 * 8


def test_the_share_of_the_matrix_rate_follows_from_operations_and_median(
    unet: Callable[..., Cell], make_task: Callable[..., Task], measure_task: Callable[..., Row]
) -> None:
    task = make_task()
    environment = replace(task.environment, ceilings=CEILINGS)
    cell = unet(mode="inference")
    row = measure_task(replace(task, cell=cell, environment=environment))
    assert row.floor is not None
    assert row.median_ms is not None
    assert matrix_share(row) == pytest.approx(row.floor.flops / 1e11 * 1e3 / row.median_ms)
    assert matrix_share(replace(row, floor=None)) is None


def test_the_contract_says_what_a_step_contains(
    unet: Callable[..., Cell], make_task: Callable[..., Task]
) -> None:
    def step(**changes: Any) -> str:
        return contract_of(replace(make_task(), cell=unet(**changes))).step

    assert "fused AdamW" in step()
    assert "next noise level" in step(mode="inference")
    assert "all blocks" in step(workload="blocks")


def test_who_offers_a_block_alone_has_no_models(
    unet: Callable[..., Cell], add_implementation: Callable[..., None]
) -> None:
    add_implementation("mine", model=None)
    assert "offers a block and no whole models" in str(unsupported(unet(impl="mine")))
    assert unsupported(unet(impl="fused")) is None


def test_a_lost_gradient_is_an_error(
    unet: Callable[..., Cell], add_implementation: Callable[..., None]
) -> None:
    def freeze(module: nn.Module) -> None:
        block = next(m for m in module.modules() if isinstance(m, ResBlock))
        forward = block.forward
        vars(block)["forward"] = lambda x, emb: forward(x, emb.detach()).detach()

    add_implementation("cut", model=faulty(freeze))
    with pytest.raises(RuntimeError, match="no gradient for"):
        drawn(unet(impl="cut")).results()


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole batches run out of memory, single images don't."""
    results = ModelWorkload.results

    def small(self: ModelWorkload, *, copied: bool = False) -> dict[str, Tensor]:
        if not self._exact and self.cell.microbatch is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return results(self, copied=copied)

    monkeypatch.setattr(ModelWorkload, "results", small)
    yield


@pytest.mark.usefixtures("tight")
def test_where_eager_does_not_fit_its_error_is_found_an_image_at_a_time(
    unet: Callable[..., Cell],
) -> None:
    truth = compute_truth(unet(dropout=0.0), CPU, 0, 0)
    assert truth.limits["loss"] > 0
    with pytest.raises(torch.OutOfMemoryError):
        compute_truth(unet(dropout=0.0, mode="inference"), CPU, 0, 0)
