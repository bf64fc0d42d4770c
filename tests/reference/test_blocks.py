"""blocks.py, all but the ResBlock: who gets the embedding, and resampling."""

import pytest
import torch
from torch import Tensor, nn

from resblock_bench.reference import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)


class AddEmbedding(TimestepBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x + emb


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_timestep_block_must_define_forward():
    class Forgot(TimestepBlock):
        pass

    with pytest.raises(NotImplementedError, match="Forgot must define forward"):
        Forgot()(torch.zeros(1), torch.zeros(1))


def test_sequence_gives_emb_to_timestep_blocks_only_and_in_order():
    seq = TimestepEmbedSequential(AddEmbedding(), Double(), AddEmbedding(), nn.Identity())
    assert seq(torch.tensor(3.0), torch.tensor(10.0)).item() == (3 + 10) * 2 + 10


def test_sequences_nest():
    inner = TimestepEmbedSequential(Double(), AddEmbedding())
    assert isinstance(inner, TimestepBlock)
    seq = TimestepEmbedSequential(inner, TimestepEmbedSequential(TimestepEmbedSequential(inner)))
    assert seq(torch.tensor(1.0), torch.tensor(5.0)).item() == (1 * 2 + 5) * 2 + 5


def test_containers_without_a_timestep_block_are_ordinary_children():
    seq = TimestepEmbedSequential(
        nn.Sequential(Double(), nn.Sequential(Double())), Wrapper(Double())
    )
    assert seq(torch.tensor(1.0), torch.tensor(5.0)).item() == 8


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda block: torch.compile(block, backend="eager"), "OptimizedModule"),
        (Wrapper, "Wrapper"),
        (nn.Sequential, "Sequential"),
        (lambda block: Wrapper(nn.Sequential(Double(), block)), "Wrapper"),
        (lambda block: Wrapper(TimestepEmbedSequential(block)), "Wrapper"),
    ],
    ids=["torch.compile", "wrapper", "nn.Sequential", "deep", "wrapped sequence"],
)
def test_a_hidden_timestep_block_is_an_error_that_names_the_child(wrap, name):
    seq = TimestepEmbedSequential(nn.Identity(), wrap(AddEmbedding()))
    with pytest.raises(TypeError, match=rf"child 1 is of class {name},.*\(\w+\).*in place"):
        seq(torch.tensor(1.0), torch.tensor(5.0))


def test_a_block_hidden_after_construction_is_found():
    seq = TimestepEmbedSequential(AddEmbedding())
    assert seq(torch.tensor(1.0), torch.tensor(5.0)).item() == 6
    seq[0] = Wrapper(seq[0])
    with pytest.raises(TypeError, match="child 0 is of class Wrapper"):
        seq(torch.tensor(1.0), torch.tensor(5.0))


def test_a_subclass_swapped_in_place_keeps_its_embedding():
    class Fused(AddEmbedding):
        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            return x + 100 * emb

    seq = TimestepEmbedSequential(AddEmbedding())
    seq[0] = Fused()
    assert seq(torch.tensor(1.0), torch.tensor(5.0)).item() == 501


def test_a_block_compiled_in_place_keeps_its_embedding():
    torch._dynamo.reset()
    block = AddEmbedding()
    block.compile(backend="eager")
    assert TimestepEmbedSequential(block)(torch.tensor(1.0), torch.tensor(5.0)).item() == 6


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpoint"])
def test_sequence_compiles_to_one_graph(randomise, use_checkpoint):
    torch._dynamo.reset()
    seq = TimestepEmbedSequential(
        ResBlock(32, 8, 0.0, use_scale_shift_norm=True, use_checkpoint=use_checkpoint),
        AttentionBlock(32, use_checkpoint=use_checkpoint),
        TimestepEmbedSequential(ResBlock(32, 8, 0.0, out_channels=64, down=True)),
        Upsample(64, False),
    )
    randomise(seq)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    compiled = torch.compile(seq, backend="aot_eager", fullgraph=True)
    results = []
    for f in (seq, compiled):
        x.requires_grad_().grad = None
        y = f(x, emb)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


SIZES = {1: (6,), 2: (4, 6), 3: (3, 4, 6)}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_upsample_is_nearest_times_two(oracle, dims):
    x = torch.randn(2, 3, *SIZES[dims])
    y = Upsample(3, False, dims)(x)
    assert torch.equal(y, oracle.resample(x, "up"))
    assert dims != 3 or y.shape == (2, 3, 3, 8, 12)  # the depth stays


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_downsample_is_the_mean_of_neighbours(oracle, dims):
    x = torch.randn(2, 3, *SIZES[dims])
    y = Downsample(3, False, dims)(x)
    torch.testing.assert_close(y, oracle.resample(x, "down"))
    assert dims != 3 or y.shape == (2, 3, 3, 2, 3)  # the depth stays


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_upsample_convolves_after_resampling(oracle, dims):
    up = Upsample(3, True, dims, out_channels=5)
    assert {k: tuple(v.shape) for k, v in up.state_dict().items()} == {
        "conv.weight": (5, 3, *[3] * dims),
        "conv.bias": (5,),
    }
    x = torch.randn(2, 3, *SIZES[dims])
    expected = oracle.conv(oracle.resample(x, "up"), up.conv.weight, up.conv.bias)
    torch.testing.assert_close(up(x), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_downsample_convolves_with_stride_two(oracle, dims):
    down = Downsample(3, True, dims, out_channels=5)
    assert {k: tuple(v.shape) for k, v in down.state_dict().items()} == {
        "op.weight": (5, 3, *[3] * dims),
        "op.bias": (5,),
    }
    x = torch.randn(2, 3, *SIZES[dims])
    y = down(x)
    torch.testing.assert_close(y, oracle.conv(x, down.op.weight, down.op.bias, stride=2))
    assert dims != 3 or y.shape == (2, 5, 3, 2, 3)  # the depth stays


@pytest.mark.parametrize("layer", [Upsample, Downsample])
def test_only_a_convolution_changes_the_width(layer):
    with pytest.raises(ValueError, match="3 -> 5 channels needs use_conv=True"):
        layer(3, False, out_channels=5)


@pytest.mark.parametrize("layer", [Upsample, Downsample])
@pytest.mark.parametrize("use_conv", [False, True])
def test_resampling_another_width_is_refused(layer, use_conv):
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\), that is 4 channels.*built for 3"):
        layer(3, use_conv)(torch.zeros(1, 4, 8, 8))
