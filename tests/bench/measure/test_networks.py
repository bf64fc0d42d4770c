"""Steps of diffusers' UNets, which cells name by their configuration."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from support.diffusers_configs import CONFIGS, TINY, needs_diffusers
from torch import nn

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.measure import diffusers_model, implementations
from resblock_bench.bench.measure.cell import Task, id_of
from resblock_bench.bench.measure.correctness import check, compute_truth
from resblock_bench.bench.measure.floor import floor_of
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.measure.memory import TrackerMeter
from resblock_bench.bench.measure.models import ModelWorkload
from resblock_bench.bench.measure.networks import network_of
from resblock_bench.bench.measure.predict_memory import predict_memory
from resblock_bench.bench.measure.workload import unsupported
from resblock_bench.bench.records import Ceilings, Cell, Row, config_name
from resblock_bench.kernels import FuseReport

pytestmark = needs_diffusers
CPU = torch.device("cpu")
FOURIER = {
    **TINY,
    "block_out_channels": [32, 32],
    "time_embedding_type": "fourier",
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
}
MORE_IN_THAN_OUT = {**TINY, "in_channels": 9, "out_channels": 4, "class_embed_type": "timestep"}


@pytest.fixture
def cell(tmp_path: Path) -> Callable[..., Cell]:
    """A cell of a configuration, as the grid has it."""

    def made(described: dict[str, Any] = TINY, **changes: Any) -> Cell:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(described))
        selection = {"workload": ("model",), "model": (str(path),), "batch": (2,)}
        found: Cell = plan([selection])[0].cell
        path.unlink()
        return replace(found, **changes)

    return made


def drawn(cell: Cell) -> ModelWorkload:
    made = KINDS[cell.workload].drawn(cell, CPU, 0)
    assert isinstance(made, ModelWorkload)
    return made


def test_the_truth_is_diffusers_model_in_float64(cell: Callable[..., Cell]) -> None:
    one = cell()
    truth = compute_truth(one, CPU, 0, 0).tensors
    model = diffusers_model.build_model(TINY)
    weights, inputs = KINDS["model"].draw_weights(one, 0), KINDS["model"].draw_inputs(one, CPU, 0)
    model.load_state_dict(weights)
    model.double()
    target = inputs.pop("target").double()
    out = model(inputs["sample"].double(), inputs["timestep"]).sample
    loss = F.mse_loss(out, target)
    loss.backward()
    expected = {"loss": loss.detach()}
    expected |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    assert truth.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(truth[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (FOURIER, "fp32"),
        (MORE_IN_THAN_OUT, "fp32"),
        (CONFIGS["sdxl"], "fp16"),
    ],
    ids=["fourier", "classes by time", "sdxl in fp16"],
)
def test_reference_and_fused_are_right(
    cell: Callable[..., Cell], config: dict[str, Any], dtype: str
) -> None:
    site = cell(config, dtype=dtype)
    truth = compute_truth(site, CPU, 0, 0)
    assert max(truth.limits.values()) < 0.3, "so lax that anything would pass"
    for impl in ("reference", "fused"):
        right, found = check(drawn(replace(site, impl=impl)).results(), truth)
        assert right, (impl, found.worst, found.errors[found.worst])


def test_every_checkpoint_mode_is_right_and_needs_less(cell: Callable[..., Cell]) -> None:
    truth = compute_truth(cell(), CPU, 0, 0)
    for impl in ("reference", "fused"):
        kept = []
        for checkpoint in ("none", "selective", "full"):
            made = drawn(cell(impl=impl, checkpoint=checkpoint))
            right, found = check(made.results(), truth)
            assert right, (impl, checkpoint, found.worst)
            kept.append(TrackerMeter().measure(made).saved_for_backward_bytes)
        assert kept == sorted(kept, reverse=True)
        assert kept[0] > kept[1]


def test_the_predicted_memory_of_diffusers_models_is_the_measured(
    cell: Callable[..., Cell],
) -> None:
    one = cell(impl="fused", checkpoint="selective")
    measured, predicted = TrackerMeter().measure(drawn(one)), predict_memory(one)
    assert predicted is not None
    for name in ("baseline_bytes", "peak_bytes", "saved_for_backward_bytes"):
        assert getattr(predicted, name) == getattr(measured, name), name


def test_a_model_of_diffusers_is_measured_with_its_dropout(
    cell: Callable[..., Cell], make_task: Callable[..., Task], measure_task: Callable[..., Row]
) -> None:
    one = cell({**TINY, "dropout": 0.25}, impl="fused", microbatch=1)
    assert one.dropout == 0.25
    row = measure_task(replace(make_task(), cell=one))
    assert row.status == "ok", row.reason
    assert row.versions["diffusers"] == diffusers_model.version()["diffusers"]


def test_only_what_had_dropout_has_it_again_after_a_check(cell: Callable[..., Cell]) -> None:
    made = drawn(cell({**TINY, "dropout": 0.25}))

    def rates() -> list[float]:
        return [m.p for m in made.block.modules() if isinstance(m, nn.Dropout)]

    before = rates()
    assert set(before) == {0.0, 0.25}
    with made.as_checked(KINDS["model"].draw_weights(made.cell, 0)):
        assert set(rates()) == {0.0}
    assert rates() == before


def test_another_version_of_diffusers_is_other_code(
    cell: Callable[..., Cell], make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    for impl in ("reference", "fused"):
        task = replace(make_task(), cell=cell(impl=impl))
        before = id_of(task)
        with monkeypatch.context() as patch:
            patch.setattr(diffusers_model, "version", lambda: {"diffusers": "0.0.1"})
            assert id_of(task) != before


def test_a_condition_beside_the_image_is_not_sampled(cell: Callable[..., Cell]) -> None:
    made = drawn(cell(MORE_IN_THAN_OUT, mode="inference"))
    found = made.results()
    x, noise = made.inputs["sample"][:, :4], found["out"]
    image = (x - 0.5**0.5 * noise) / 0.5**0.5
    torch.testing.assert_close(found["next"], 0.6**0.5 * image + 0.4**0.5 * noise)


def test_operations_are_three_times_as_many_in_training(cell: Callable[..., Cell]) -> None:
    ceilings = Ceilings(
        copy_bytes_per_s=1e10, peak_bytes_per_s=1e10, matrix_flops_per_s={"fp32": 1e11}
    )
    inference = floor_of(cell(mode="inference"), ceilings, 1.0).flops
    assert 2.8 * inference < floor_of(cell(), ceilings, 1.0).flops < 3 * inference


def test_a_model_in_which_nothing_is_fused_is_no_fused_one(
    cell: Callable[..., Cell],
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resblock_bench.kernels.fuse_", lambda model, mode: FuseReport())
    row = measure_task(replace(make_task(), cell=cell(impl="fused")))
    assert (row.status, row.reason) == (
        "skipped",
        "fuse_ finds nothing to fuse in it: fused would be the reference",
    )


def test_without_diffusers_its_models_are_skipped(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cell()
    assert unsupported(one) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unsupported(one) == "diffusers is not installed: pip install diffusers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "UNet2DModel-00000000"}, "model is not named after its config"),
        ({"model": "iddpm-cifar10-uncond"}, "model is not named after its config"),
        ({"workload": "blocks"}, "neither a block nor all blocks are measured"),
        ({"config": "x" * (2**20 + 1)}, "length <= 1048576"),
    ],
)
def test_a_cell_whose_configuration_was_exchanged_is_refused(
    cell: Callable[..., Cell], changes: dict[str, Any], message: str
) -> None:
    whole = msgspec.to_builtins(cell())
    assert msgspec.convert(whole, Cell) == cell()
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert({**whole, **changes}, Cell)


def test_a_configuration_in_a_cell_is_checked_like_a_file(
    cell: Callable[..., Cell], make_task: Callable[..., Task], measure_task: Callable[..., Row]
) -> None:
    text = json.dumps({**TINY, "layers_per_block": 10**9})
    with pytest.raises(Exception, match="layers_per_block is 1000000000, and at most 64"):
        network_of(cell(config=text, model=config_name("UNet2DModel", text)))
    nameless = cell(config=None)
    with pytest.raises(InvalidError, match="is no published model"):
        network_of(nameless)


def test_selective_checkpointing_is_of_diffusers_blocks_alone() -> None:
    model = diffusers_model.build_model(TINY)
    implementations.keep_convolutions_in_blocks(model)
    wrapped = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
    assert wrapped == {"ResnetBlock2D"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_model_is_measured(
    cell: Callable[..., Cell],
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced, but not turned into code, which takes a minute."""
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    row = measure_task(replace(make_task(), cell=cell(impl="compiled", checkpoint="full")))
    assert row.status == "ok", row.reason
    assert row.memory is None
    assert "torch.compile" in (row.memory_note or "")
