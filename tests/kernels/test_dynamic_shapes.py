"""Batch, height and width may be symbols: one graph for all of them, exported or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.export import Dim, export

from resblock_bench import kernels
from resblock_bench.kernels import GroupNormSiLU, group_norm_silu

pytestmark = [
    pytest.mark.slow,
    # Dynamo instantiates autograd functions, and warns of itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Norm(nn.Module):
    """The operator with everything that modulates."""

    def __init__(self, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift, pre_shift, _ = emb.chunk(4, dim=1)
        return group_norm_silu(
            x, 2, self.weight, self.bias, scale, shift, pre_shift=pre_shift, dropout_p=0.1,
            activation=self.activation, training=self.training,
        )  # fmt: skip


def block(**options: Any) -> nn.Module:
    made = kernels.ResBlock(64, 32, 0.1, use_scale_shift_norm=True, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.1)
    return made


MODELS: dict[str, Any] = {
    "operator": (8, Norm),
    "block": (64, block),
    "selective": (64, lambda: block(checkpoint="selective")),
    "selective, up": (64, lambda: block(checkpoint="selective", up=True)),
    "selective, down": (64, lambda: block(checkpoint="selective", down=True)),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def inputs(channels: int, layout: torch.memory_format, N: int, H: int, W: int) -> list[Tensor]:
    x = torch.randn(N, channels, H, W).contiguous(memory_format=layout)
    return [x.requires_grad_(), torch.randn(N, 32, requires_grad=True)]


@pytest.mark.parametrize(
    ("name", "training"),
    [("operator", True), ("block", True), ("block", False), ("selective", True)],
)
def test_one_exported_program(name: str, training: bool) -> None:
    channels, make = MODELS[name]
    model = make().train(training)
    n, h, w = Dim("n"), Dim("h", min=4), Dim("w", min=4)
    shapes = ({0: n, 2: h, 3: w}, {0: n})
    example = tuple(inputs(channels, NCHW, 4, 8, 6))
    program = export(model, example, dynamic_shapes=shapes, strict=True).module()
    others = inputs(channels, NCHW, 7, 5, 9)
    outputs = []
    for function in (program, model):
        torch.manual_seed(0)
        outputs.append(function(*others))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("operator", NCHW), ("block", NHWC), ("selective, up", NHWC), ("selective, down", NCHW)],
)
def test_ten_sizes_in_two_graphs(name: str, layout: torch.memory_format) -> None:
    """A specialised one would be a graph for each; the first size may look special."""
    torch._dynamo.reset()
    channels, make = MODELS[name]
    model = make()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for i in range(2, 12):
        leaves = inputs(channels, layout, i, 4 + i, 5 + i)
        if 2 < i < 11:
            compiled(*leaves).sum().backward()
            continue
        results = []
        for function in (compiled, model):
            torch.manual_seed(0)
            y = function(*leaves)
            gradients = torch.autograd.grad(y.square().sum(), [*leaves, *model.parameters()])
            results.append((y.detach(), *gradients))
        for found, expected in zip(*results, strict=True):
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "maps"])
def test_the_module_alone(vectors: bool) -> None:
    torch._dynamo.reset()
    norm = GroupNormSiLU(2, 8, activation=None)
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in range(2, 12):
        x = torch.randn(n, 8, *(() if vectors else (n, 3)))
        torch.testing.assert_close(compiled(x), norm(x))
