import subprocess
import sys
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from resblock_bench.bench.measure.memory import TrackerMeter, peak_resident_bytes
from resblock_bench.bench.measure.predict_memory import predict_memory
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell, Memory

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


def repeatable(memory: Memory) -> Memory:
    """Without what the operating system says, which no two processes share."""
    return msgspec.structs.replace(memory, process_bytes=None)


@pytest.mark.parametrize(("impl", "checkpoint"), VARIANTS)
def test_two_measurements_are_identical(make_cell: MakeCell, impl: str, checkpoint: str) -> None:
    cell = make_cell(impl=impl, checkpoint=checkpoint, channels=64, dropout=0.1)
    made = workload(cell)
    first = repeatable(TrackerMeter().measure(made))
    assert repeatable(TrackerMeter().measure(made)) == first
    assert repeatable(measured(cell)) == first


# A cell's process is forked from one that has imported everything and computed nothing.
FRESH_PROCESSES = """
import os, sys, msgspec
import resblock_bench.bench.measure.preload
from resblock_bench.bench.measure.memory import TrackerMeter
from resblock_bench.bench.records import Cell
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
import torch

torch.set_num_threads(1)

def measure(cell):
    cpu = torch.device("cpu")
    made = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, cpu, 0), cpu)
    meter = TrackerMeter()
    memory = meter.measure(made, meter.first_results(made)[1])
    os.write(1, msgspec.json.encode(memory) + b"\\n")

for cell in msgspec.json.decode(sys.argv[1], type=list[Cell]):
    child = os.fork()
    if child == 0:
        measure(cell)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_fresh_processes_agree_to_the_byte(make_cell: MakeCell) -> None:
    """Two runs, each in an interpreter of its own with its own hash seed and addresses."""
    cells = [make_cell(impl=i, checkpoint=c, channels=64, dropout=0.1) for i, c in VARIANTS]
    command = [sys.executable, "-c", FRESH_PROCESSES, msgspec.json.encode(cells).decode()]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=600)[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    first, second = (
        [repeatable(msgspec.json.decode(line, type=Memory)) for line in lines] for lines in outputs
    )
    assert len(first) == len(VARIANTS)
    assert second == first
    for memory in first:
        assert memory.cold_peak_bytes is not None
        assert memory.cold_peak_bytes >= memory.peak_bytes > memory.baseline_bytes


def test_what_only_the_first_step_needs_is_in_the_cold_peak_only(
    make_cell: MakeCell, add_implementation: Callable[..., None]
) -> None:
    steps: list[int] = []

    def around(module: torch.nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        scratch = x.new_empty(0 if steps else 2**20)
        steps.append(1)
        out: Tensor = module(x, emb)
        del scratch
        return out

    add_implementation("warming_up", around)
    made = workload(make_cell(impl="warming_up"))
    meter = TrackerMeter()
    results, cold = meter.first_results(made)
    assert set(results) == {"out", *(f"grad {name}" for name in made.leaves())}
    memory = meter.measure(made, cold)
    assert memory.cold_peak_bytes == cold
    assert cold > memory.baseline_bytes + 4 * 2**20 > memory.peak_bytes


def test_tensors_of_others_do_not_count(make_cell: MakeCell) -> None:
    cell = make_cell(impl="fused")
    alone = measured(cell)
    unrelated = torch.zeros(2**24)
    assert repeatable(measured(cell)) == repeatable(alone)
    del unrelated


def test_the_resident_set_includes_what_was_touched() -> None:
    """In bytes: an error in the unit would be off by 1024."""
    before = peak_resident_bytes()
    touched = torch.ones(2**28 // 4)
    del touched
    after = peak_resident_bytes()
    assert 2**26 < before <= after < 2**36
    assert after > 2**28


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
    assert predicted.process_bytes is None
    fields = [name for name in Memory.__struct_fields__ if name not in ("method", "process_bytes")]
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
