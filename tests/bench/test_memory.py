from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from resblock_bench.bench.memory import TrackerMeter
from resblock_bench.bench.predict import predict_memory
from resblock_bench.bench.records import Cell, Memory
from resblock_bench.bench.workload import Workload, draw_inputs, draw_weights

CPU = torch.device("cpu")
MakeCell = Callable[..., Cell]
VARIANTS = [
    (impl, checkpoint)
    for impl in ("reference", "fused")
    for checkpoint in ("none", "selective", "full")
]


def workload(cell: Cell) -> Workload:
    return Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU)


def measured(cell: Cell) -> Memory:
    return TrackerMeter().measure(workload(cell))


@pytest.mark.parametrize(("impl", "checkpoint"), VARIANTS)
def test_two_measurements_are_identical(make_cell: MakeCell, impl: str, checkpoint: str) -> None:
    cell = make_cell(impl=impl, checkpoint=checkpoint, channels=64, dropout=0.1)
    made = workload(cell)
    first = TrackerMeter().measure(made)
    assert TrackerMeter().measure(made) == first
    assert measured(cell) == first


@pytest.mark.parametrize(
    ("impl", "checkpoint", "mode"),
    [
        (impl, checkpoint, mode)
        for impl, checkpoint in VARIANTS
        for mode in ("inference", "forward", "train")
        if mode == "train" or checkpoint == "none"
    ],
)
def test_the_prediction_is_the_measurement(
    make_cell: MakeCell, impl: str, checkpoint: str, mode: str
) -> None:
    cell = make_cell(impl=impl, checkpoint=checkpoint, mode=mode, channels=64, dropout=0.1)
    predicted = predict_memory(cell)
    real = measured(cell)
    assert predicted is not None
    assert (predicted.method, real.method) == ("fake_tensors", "mem_tracker")
    fields = [name for name in Memory.__struct_fields__ if name != "method"]
    assert {f: getattr(predicted, f) for f in fields} == {f: getattr(real, f) for f in fields}


@pytest.mark.parametrize("shape", [{"dims": 1}, {"dims": 3}, {"layout": "nhwc"}, {"dtype": "bf16"}])
def test_the_prediction_holds_for_other_shapes(
    make_cell: MakeCell, shape: dict[str, object]
) -> None:
    cell = make_cell(out_channels=64, conditioning="add", updown="up", impl="fused", **shape)
    predicted, real = predict_memory(cell), measured(cell)
    assert predicted is not None
    assert predicted.peak_bytes == real.peak_bytes


def test_what_cannot_be_predicted_is_none(make_cell: MakeCell) -> None:
    assert predict_memory(make_cell(impl="compiled")) is None
    assert predict_memory(make_cell(dims=1, layout="nhwc")) is None


def test_the_baseline_is_parameters_inputs_and_cotangent(make_cell: MakeCell) -> None:
    cell = make_cell(out_channels=64)
    made = workload(cell)
    tensors = [*made.block.parameters(), made.x, made.emb, made.cotangent]
    assert measured(cell).baseline_bytes == sum(t.numel() * 4 for t in tensors)


def test_the_peak_of_inference_can_be_counted_by_hand(
    make_cell: MakeCell, add_implementation: Callable[..., None]
) -> None:
    """Two doublings of x in a row: at most the first and the second are alive at once."""

    def around(module: torch.nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        doubled = x * 2
        quadrupled = doubled * 2
        del doubled
        return quadrupled + 1

    add_implementation("by_hand", around)
    cell = make_cell(impl="by_hand", mode="inference", batch=4)
    memory = measured(cell)
    assert memory.peak_above_baseline_bytes == 2 * 4 * 32 * 8 * 8 * 4
    assert memory.peak_bytes == memory.baseline_bytes + memory.peak_above_baseline_bytes
    assert memory.saved_for_backward_bytes == 0


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_saved_bytes_are_those_of_saved_tensors_hooks(make_cell: MakeCell, impl: str) -> None:
    """Without checkpointing both ways of counting must agree."""
    made = workload(make_cell(impl=impl, channels=64, out_channels=96))
    parameters = {p.untyped_storage().data_ptr() for p in made.block.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = made.call(made.x, made.emb)
    by_hooks = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in parameters
    )
    del out
    assert TrackerMeter().measure(made).saved_for_backward_bytes == by_hooks


def test_full_checkpointing_keeps_the_inputs_and_selective_the_convolutions(
    make_cell: MakeCell,
) -> None:
    saved = {
        mode: measured(make_cell(checkpoint=mode, batch=8)).saved_for_backward_bytes
        for mode in ("none", "selective", "full")
    }
    activation = 8 * 32 * 8 * 8 * 4
    inputs = activation + 8 * 16 * 4
    rng_state = saved["full"] - inputs
    assert 0 <= rng_state < 8192
    assert saved["selective"] - saved["full"] in (activation, 2 * activation)
    assert saved["none"] > saved["selective"]


def test_bytes_hidden_on_a_context_are_counted(
    make_cell: MakeCell, add_implementation: Callable[..., None]
) -> None:
    """Hooks do not see tensors that are plain attributes of a context; the graph holds them."""

    class Hoarder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, size):  # type: ignore[no-untyped-def]
            ctx.hoard = x.new_empty(size)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad, None

    def around(size: int, module: torch.nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = module(Hoarder.apply(x, size), emb)
        return out

    add_implementation("plain", partial(around, 0))
    add_implementation("hoarding", partial(around, 1000))
    plain, hoarding = (measured(make_cell(impl=impl)) for impl in ("plain", "hoarding"))
    assert hoarding.saved_for_backward_bytes - plain.saved_for_backward_bytes == 4000


def test_the_prediction_computes_nothing(make_cell: MakeCell) -> None:
    """2^14 images of 2^14 channels at 512² would need petabytes."""
    memory = predict_memory(make_cell(batch=2**14, channels=2**14, resolution=512))
    assert memory is not None
    assert memory.peak_bytes > 2**50
