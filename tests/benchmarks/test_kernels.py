"""The operator and the block at published shapes: `make benchmark`, or `pytest -m benchmark`.

Every benchmark is first held against the formula in float64. Small shapes in fp32 on a CPU, larger
ones in bf16 on CUDA. Dropout is off, so that what is timed is what was checked.
"""

import functools
import time
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from support.device_time import DeviceTime
from support.oracle import Problem, eager
from support.oracle import check as check_operator
from support.running import run_operator
from torch import Tensor, nn

from resblock_bench.bench.cost.gpu_figures import architecture, gpu_that_copies
from resblock_bench.bench.grid.grid import GROUPS, plan
from resblock_bench.bench.measure import correctness
from resblock_bench.bench.measure.devices import default_kind
from resblock_bench.bench.measure.floor import floor_of
from resblock_bench.bench.measure.workload import (
    DTYPES,
    Workload,
    checked_cell,
    draw_inputs,
    draw_weights,
)
from resblock_bench.bench.records import Ceilings, Cell, Floor, site_of

CUDA = default_kind() == "cuda"
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Model, resolution, channels, batch.
SITES = (
    [
        ("adm-imagenet256-cond", 128, 256, 8),
        ("adm-imagenet64-cond", 64, 192, 64),
        ("iddpm-cifar10-uncond", 16, 256, 128),
    ]
    if CUDA
    else [
        ("iddpm-cifar10-uncond", 32, 128, 2),
        ("iddpm-imagenet64-uncond", 16, 384, 1),
    ]
)
OPERATORS: dict[str, Callable[[Problem], Tensor]] = {"reference": eager, "fused": run_operator}

pytestmark = pytest.mark.benchmark(
    timer=DeviceTime() if CUDA else time.perf_counter, disable_gc=True
)


def block_cells(model: str, resolution: int, channels: int, batch: int) -> list[Cell]:
    """The variants of one block of a model, without dropout."""
    selection = {
        "model": (model,),
        "resolution": (resolution,),
        "channels": (channels,),
        "out_channels": (channels,),
        "batch": (batch,),
        "dtype": ("bf16" if CUDA else "fp32",),
        "impl": ("reference", "fused"),
        "checkpoint": ("none", "selective", "full"),
    }
    cells = [checked_cell(item.cell) for item in plan([selection])]
    return [cell for cell in cells if cell.updown == "none"]


BLOCKS = [cell for site in SITES for cell in block_cells(*site)]


def shape_of(cell: Cell) -> str:
    return f"{cell.channels}x{cell.resolution}x{cell.resolution}-b{cell.batch}-{cell.dtype}"


class Operator(Workload):
    """The norm of a block, as a workload: x, `emb` = (scale, shift), and an affine in float32."""

    def __init__(self, cell: Cell, impl: str, mode: Literal["forward", "train"]) -> None:
        self._generator = generator = torch.Generator(DEVICE).manual_seed(0)
        dtype, C = DTYPES[cell.dtype], cell.channels

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        inputs = draw_inputs(cell, DEVICE, 0)
        self.mode = mode
        self.cell, self.impl = cell, impl
        self.block = nn.Module()
        self.block.weight = nn.Parameter(1 + 0.1 * normal(C))
        self.block.bias = nn.Parameter(0.1 * normal(C))
        self.x = inputs.x.requires_grad_()
        self.emb = normal(cell.batch, 2 * C).to(dtype).requires_grad_()
        self.cotangent = inputs.cotangent
        self._operator, self._generator = OPERATORS[impl], generator
        self.call = lambda x, emb: self._operator(self.problem(x, emb))

    def problem(self, x: Tensor, emb: Tensor) -> Problem:
        scale, shift = emb.chunk(2, dim=1)
        weight, bias = self.block.weight, self.block.bias
        return Problem(x, self.cotangent, GROUPS, weight, bias, scale, shift)

    def check(self) -> None:
        check_operator(self._operator, self.problem(self.x.detach(), self.emb.detach()))

    def output(self) -> tuple[Tensor]:
        self.reset()
        return (self.call(self.x, self.emb),)

    def backward(self, out: Tensor) -> None:
        torch.autograd.backward(out, self.cotangent)

    def predicted_us(
        self, direction: Literal["forward", "backward"], device_name: str, ceilings: Ceilings
    ) -> float | None:
        """What the model says of this operator on a GPU that it knows."""
        arch = architecture(device_name)
        if arch is None:
            return None
        # Here and not above: on a CPU the benchmarks run without Triton.
        from resblock_bench.bench.compiled.norms import Norm
        from resblock_bench.bench.cost.eager_chain import eager_chain, predict_chain
        from resblock_bench.bench.cost.predictions import predict_compiled

        cell = self.cell
        norm = Norm(
            batch=cell.batch,
            channels=cell.channels,
            positions=cell.resolution**cell.dims,
            groups=GROUPS,
            dtype=cell.dtype,
            layout=cell.layout,
            modulation="scale_shift",
            bias_folded=False,
            dropout=0.0,
        )
        gpu = gpu_that_copies(arch, ceilings.copy_bytes_per_s)
        if self.impl == "reference":
            return predict_chain(eager_chain(norm, direction), norm, gpu).us
        return predict_compiled(norm, direction, arch, gpu).us

    def floor(self, ceilings: Ceilings, median_ms: float) -> Floor:
        """Forward: read x and what modulates it, write y. Backward: also read dy; write gradients.

        No operations are counted: there is no matrix product.
        """
        leaves = sum(leaf.nbytes for leaf in self.leaves().values())
        image = self.cotangent.nbytes  # y, or dy
        moved = leaves + image if self.mode == "forward" else 2 * leaves + image
        needed_ms = moved / ceilings.copy_bytes_per_s * 1e3
        return Floor(
            bytes=moved, flops=0, bytes_ms=needed_ms, flops_ms=0.0, share=needed_ms / median_ms
        )


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cell", [c for c in BLOCKS if c == site_of(c)], ids=shape_of)
def test_group_norm_silu(
    cell: Cell, direction: Literal["forward", "backward"], impl: str, measure: Callable[..., None]
) -> None:
    forward = direction == "forward"
    operator = Operator(cell, impl, "forward" if forward else "train")
    measure(
        group=f"group_norm_silu {direction}, {cell.model} {shape_of(cell)}",
        cell=cell,
        workload=operator,
        check=operator.check,
        prepare=tuple if forward else operator.output,
        run=operator.step if forward else operator.backward,
        floor=operator.floor,
        predicted=functools.partial(operator.predicted_us, direction),
    )


@functools.cache
def truth(site: Cell) -> correctness.Truth:
    return correctness.compute_truth(site, DEVICE, 0, 0)


@pytest.mark.parametrize(
    "cell", BLOCKS, ids=lambda cell: f"{shape_of(cell)}-{cell.impl}-{cell.checkpoint}"
)
def test_block(cell: Cell, measure: Callable[..., None]) -> None:
    workload = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, DEVICE, 0), DEVICE)

    def check() -> None:
        right, record = correctness.check(workload.results(), truth(site_of(cell)))
        assert right, f"{record.worst}: {record.errors} above {record.limits}"

    def prepare() -> tuple[()]:
        workload.reset()
        return ()

    measure(
        group=f"training step, {cell.model} {shape_of(cell)}",
        cell=cell,
        workload=workload,
        check=check,
        prepare=prepare,
        run=workload.step,
        floor=functools.partial(floor_of, cell),
    )
