from collections.abc import Callable

import pytest
import torch
from torch import nn

from resblock_bench.bench.measure.workload import (
    Inputs,
    Workload,
    draw_inputs,
    draw_weights,
    unsupported,
)
from resblock_bench.bench.records import Cell

CPU = torch.device("cpu")
MakeCell = Callable[..., Cell]


def workload(cell: Cell) -> Workload:
    return Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU)


@pytest.mark.parametrize("impl", ["fused"])
@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_all_variants_share_weights_and_inputs(
    make_cell: MakeCell, impl: str, checkpoint: str
) -> None:
    ours, theirs = workload(make_cell(impl=impl, checkpoint=checkpoint)), workload(make_cell())
    assert ours.leaves().keys() == theirs.leaves().keys()
    for name, leaf in theirs.leaves().items():
        assert torch.equal(ours.leaves()[name], leaf), name


def test_nothing_is_trivial(make_cell: MakeCell) -> None:
    """A fresh block is its skip path; here every weight and every input counts."""
    cell = make_cell(out_channels=64)
    for name, tensor in draw_weights(cell, 0).items():
        assert tensor.std() > 0, name
        gain = name.endswith("layers.0.weight")
        assert tensor.mean() == pytest.approx(1 if gain else 0, abs=0.1), name
    block = workload(cell).block
    x = torch.randn(2, 32, 8, 8)
    branch = block(x, torch.randn(2, 16)) - block.skip_connection(x)
    assert 0.1 < branch.std() < 10


def test_inputs_are_normal_and_seeded(make_cell: MakeCell) -> None:
    cell = make_cell(batch=64)
    first, again, other = (draw_inputs(cell, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    for tensor in vars(first).values():
        assert tensor.mean().abs() < 0.1
        assert tensor.std() == pytest.approx(1, abs=0.1)


def test_16_bit_cells_keep_norms_linears_and_embedding_in_32(make_cell: MakeCell) -> None:
    made = workload(make_cell(dtype="bf16", out_channels=64))
    for module in made.block.modules():
        expected = torch.bfloat16 if isinstance(module, nn.Conv2d) else torch.float32
        assert {p.dtype for p in module.parameters(recurse=False)} <= {expected}
    assert (made.x.dtype, made.emb.dtype) == (torch.bfloat16, torch.float32)
    assert made.step().dtype == torch.bfloat16


@pytest.mark.parametrize("dims", [2, 3])
def test_nhwc_cells_have_channels_last_inputs_and_weights(make_cell: MakeCell, dims: int) -> None:
    made = workload(make_cell(layout="nhwc", dims=dims, channels=64))
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    weight = made.block.get_parameter("in_layers.2.weight")
    for tensor in (made.x, made.cotangent, weight):
        assert tensor.is_contiguous(memory_format=last)
        assert not tensor.is_contiguous()


def test_channels_last_in_one_dimension_does_not_exist(make_cell: MakeCell) -> None:
    assert "one spatial dimension" in (unsupported(make_cell(layout="nhwc", dims=1)) or "")
    assert unsupported(make_cell(layout="nhwc")) is None


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("updown", ["none", "up", "down"])
def test_the_cotangent_has_the_shape_of_the_output(
    make_cell: MakeCell, dims: int, updown: str
) -> None:
    made = workload(make_cell(dims=dims, updown=updown, out_channels=64))
    assert made.step().shape == made.cotangent.shape


@pytest.mark.parametrize("mode", ["inference", "forward", "train"])
def test_a_step_contains_what_the_contract_says(make_cell: MakeCell, mode: str) -> None:
    made = workload(make_cell(mode=mode, dropout=0.5))
    out = made.step()
    assert made.block.training == (mode != "inference")
    assert (out.grad_fn is not None) == (mode != "inference")
    graded = {name for name, leaf in made.leaves().items() if leaf.grad is not None}
    assert graded == (set(made.leaves()) if mode == "train" else set())
    made.reset()
    assert all(leaf.grad is None for leaf in made.leaves().values())


def test_a_lost_gradient_is_an_error(
    make_cell: MakeCell, add_implementation: Callable[..., None]
) -> None:
    add_implementation("detached", lambda module, x, emb: module(x, emb.detach()))
    with pytest.raises(RuntimeError, match="no gradient for emb"):
        workload(make_cell(impl="detached")).results()


def test_results_are_repeatable(make_cell: MakeCell) -> None:
    made = workload(make_cell())
    first, second = made.results(), made.results()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_of_one_workload_are_not_shared_with_another(make_cell: MakeCell) -> None:
    cell = make_cell()
    inputs: Inputs = draw_inputs(cell, CPU, 0)
    first = Workload(cell, draw_weights(cell, 0), inputs, CPU)
    second = Workload(cell, draw_weights(cell, 0), inputs, CPU)
    first.step()
    assert first.x.grad is not None
    assert second.x.grad is None


def test_a_step_has_other_places_in_memory_after_every_drawing(make_cell: MakeCell) -> None:
    moving = workload(make_cell(channels=64, out_channels=64, resolution=16))
    weight = dict(moving.block.named_parameters())["in_layers.2.weight"]
    before, kept = weight.detach().clone(), set()
    for _ in range(6):
        moving.redraw()
        kept.add((moving.x.data_ptr(), weight.data_ptr(), moving.step().data_ptr()))
    assert len(kept) > 1
    assert dict(moving.block.named_parameters())["in_layers.2.weight"] is weight
    assert torch.equal(weight, before)
