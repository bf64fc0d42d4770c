"""What eager PyTorch and torch.compile launch in the operator's place, and a prediction of it.

Eager's chain is that of the reference: read from ATen's CUDA sources (group_norm.cpp and
cuda/group_norm_kernel.cu of PyTorch, 2025; derivatives.yaml), kernel by kernel:

    forward    x + e (modulation "add") · x to fp32 (16-bit) · to contiguous (channels-last)
               · RowwiseMoments, one block a group: reads x
               · ComputeFusedParams: [N, C] · affine: reads x, writes y · y to 16 bits
               · 1 + scale: [N, C] · times · plus shift · SiLU · dropout with its mask
    backward   dropout · SiLU: reads dy and z · Σ dy for shift · dy(1 + scale) · dy·h, Σ for scale
               · the halves of a chunk joined: [N, 2C] · dy to fp32 · dy and x to contiguous
               · ComputeInternalGradients: reads dy, x · rstd·γ, ComputeBackwardFusedParams and
               GammaBetaBackward: [N, C] · dx: reads dy, x · dx to 16 bits · Σ dx for e

On CUDA, ATen's group norm knows no channels-last: it makes x contiguous (again in the backward,
which saved x as it came) and returns NCHW. That the gradient arrives channels-last there is
assumed, as is that nothing later converts y back: a convolution would, and is not counted.

torch.compile's chain is assumed to be: forward statistics, then normalise, modulate and activate
(3 passes); backward sums over positions, sums over groups, dx, sums over samples (5 passes).

Every kernel is taken at its best: its bytes at full bandwidth, whatever its grid. So a ratio to the
chain is a lower bound of what fusing gains, as far as the kernels' own predictions hold.
"""

from __future__ import annotations

from typing import NamedTuple

from resblock_bench.bench.compiled.norms import Direction, Norm
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.kernels.tiers import L2_SHARE

from .gpu_figures import GpuFigures
from .predict_time import Bound, Prediction, sum_up


class ChainKernel(NamedTuple):
    """One kernel, in passes over the activation at its storage dtype.

    first   read for the first time in this direction, so from memory
    again   read after an earlier kernel read or wrote it: from L2 where that holds it
    """

    name: str
    first: float = 0.0
    again: float = 0.0
    written: float = 0.0


def eager_chain(norm: Norm, direction: Direction) -> list[ChainKernel]:
    """The kernels of the reference's operator, in order. A rewrite runs the forward once more."""
    return _eager_backward(norm) if direction == "backward" else _eager_forward(norm)


def _eager_forward(norm: Norm) -> list[ChainKernel]:
    size = DTYPES[norm.dtype].itemsize
    wide = 4 / size  # passes of an fp32 tensor
    chain = []
    if norm.modulation == "add":
        chain.append(ChainKernel("x + e", first=1, written=1))
    if size < 4:
        chain.append(ChainKernel("x to fp32", first=1, written=wide))
    if norm.layout == "nhwc":
        chain.append(ChainKernel("x to contiguous", first=wide, written=wide))
    chain += [
        ChainKernel("RowwiseMoments", first=wide),
        ChainKernel("ComputeFusedParams"),
        ChainKernel("affine", again=wide, written=wide),
    ]
    if size < 4:
        chain.append(ChainKernel("y to 16 bits", again=wide, written=1))
    if norm.modulation == "scale_shift":
        chain += [
            ChainKernel("1 + scale"),
            ChainKernel("times (1 + scale)", again=1, written=1),
            ChainKernel("plus shift", again=1, written=1),
        ]
    chain.append(ChainKernel("silu", again=1, written=1))
    if norm.dropout:
        chain.append(ChainKernel("dropout", again=1, written=1 + 1 / size))  # a byte of mask
    return _first_reads_once(chain)


def _eager_backward(norm: Norm) -> list[ChainKernel]:
    size = DTYPES[norm.dtype].itemsize
    wide = 4 / size
    chain = []
    if norm.dropout:
        chain.append(ChainKernel("dropout", first=1 + 1 / size, written=1))
    chain.append(
        ChainKernel("silu", first=1, again=1, written=1)
        if norm.dropout
        else ChainKernel("silu", first=2, written=1)
    )
    if norm.modulation == "scale_shift":
        chain += [
            ChainKernel("sum for shift", again=1),
            ChainKernel("times (1 + scale)", again=1, written=1),
            ChainKernel("times h", first=1, again=1, written=1),
            ChainKernel("sum for scale", again=1),
            ChainKernel("scale and shift joined"),
        ]
    if size < 4:
        chain.append(ChainKernel("dy to fp32", again=1, written=wide))
    if norm.layout == "nhwc":
        chain += [
            ChainKernel("dy to contiguous", again=wide, written=wide),
            ChainKernel("x to contiguous", first=wide, written=wide),
        ]
    known = norm.layout == "nhwc"  # x was read to be made contiguous
    chain += [
        ChainKernel(
            "ComputeInternalGradients", first=0 if known else wide, again=wide * (1 + known)
        ),
        ChainKernel("rstd·γ"),
        ChainKernel("ComputeBackwardFusedParams"),
        ChainKernel("dx", again=2 * wide, written=wide),
        ChainKernel("GammaBetaBackward"),
    ]
    if size < 4:
        chain.append(ChainKernel("dx to 16 bits", again=wide, written=1))
    if norm.modulation == "add":
        chain.append(ChainKernel("sum for e", again=1))
    return chain


def _first_reads_once(chain: list[ChainKernel]) -> list[ChainKernel]:
    """Only the first kernel that touches x reads it from memory for certain."""
    head = next(i for i, kernel in enumerate(chain) if kernel.first)
    return [
        kernel if i <= head else kernel._replace(first=0.0, again=kernel.again + kernel.first)
        for i, kernel in enumerate(chain)
    ]


def compiled_chain(norm: Norm, direction: Direction) -> list[ChainKernel]:
    """What torch.compile is assumed to launch."""
    if direction == "backward":
        return [
            ChainKernel("sums over positions", first=2),
            ChainKernel("sums over groups"),
            ChainKernel("dx", again=2, written=1),
            ChainKernel("sums over samples"),
        ]
    return [
        ChainKernel("statistics", first=1),
        ChainKernel("normalise and activate", again=1, written=1),
    ]


def predict_chain(chain: list[ChainKernel], norm: Norm, gpu: GpuFigures) -> Prediction:
    """Each kernel's launch, first latency and bytes, one kernel after another.

    What is read again comes from L2 if all that the kernel reads and writes fits what `tiers` takes
    of it.
    """
    shares: list[tuple[Bound, float]] = []
    image = activation_bytes(norm)
    for kernel in chain:
        touched = kernel.first + kernel.again + kernel.written
        fits = touched * image <= L2_SHARE * gpu.l2_bytes
        from_l2 = kernel.again if fits else 0.0
        memory_us = 1e6 * (touched - from_l2) * image / gpu.copy_bytes_per_s
        l2_us = 1e6 * from_l2 * image / gpu.l2_bytes_per_s
        latency_us = (
            gpu.memory_latency_us if touched - kernel.written > from_l2 else gpu.l2_latency_us
        )
        shares += [
            ("start", gpu.launch_us + latency_us),
            ("memory", memory_us) if memory_us >= l2_us else ("L2", l2_us),
        ]
    return sum_up(shares)


def activation_bytes(norm: Norm) -> int:
    """One pass over the activation."""
    return norm.batch * norm.channels * norm.positions * DTYPES[norm.dtype].itemsize
