"""The host's part of one call of the fused operator, with no GPU, beside eager's for the same call.

A small map is done sooner on a GPU than its kernels are launched, so there the host decides. The
operator runs as a user calls it, compiled kernels and autograd included, on a driver whose launch
does nothing (idle_driver.py). Eager's chain has no driver to replace: it runs on the CPU, at the
smallest size at which it dispatches the operators that it dispatches at full size (a test compares
the two lists), where an operator's loop over 64 elements takes some 3 % of its time. On the meta
device it could not be timed, since that runs Python in place of ATen's group norm.

Neither has the time that the driver takes for a launch, some 2 µs each, in which eager's many
kernels lose more than our few: `kernels` counts them, ours by recording the launches, eager's by
reading ATen's CUDA sources (eager_chain.py). Both times are of one process, in turns of a few calls
each: with every call the other's code would have to be fetched into the caches anew, which takes
both a fifth longer and is like no model, where convolutions stand between two norms.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.bench.records import DType, Record
from resblock_bench.kernels.functional import group_norm_silu
from resblock_bench.kernels.launcher import recording

GROUPS = 32
SHAPE = (8, 256, 8, 8)
SMALLEST = (1, GROUPS, 1, 2)
TURN = 10  # calls, before it is the other's turn
WARMUP = 20
ROUNDS = 200


class Span(Record, frozen=True, kw_only=True):
    """Of one call: its forward, backward (torch.autograd.grad) and both, µs, and its kernels."""

    forward_us: float
    backward_us: float
    both_us: float
    forward_kernels: int
    backward_kernels: int


class HostTime(Record, frozen=True, kw_only=True):
    """y = silu(norm(x)·(1 + scale) + shift), with the affine in fp32, x of `shape` in `dtype`."""

    shape: tuple[int, ...]
    dtype: DType
    ours: Span
    eager: Span

    @property
    def ratio(self) -> float:
        """Of ours to eager's, forward and backward together."""
        return self.ours.both_us / self.eager.both_us


def measure_host_time(dtype: DType) -> HostTime:
    """In a process whose kernels are compiled: a job for a worker that does not interpret."""
    from .idle_driver import idle_driver

    ours, eager = inputs(SHAPE, dtype), inputs(SMALLEST, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with idle_driver():
            forward, backward = kernels_launched(ours)
            ours_us, eager_us = _in_turns((_fused, ours), (eager_call, eager))
    finally:
        torch.set_num_threads(threads)
    return HostTime(
        shape=SHAPE,
        dtype=dtype,
        ours=_span(ours_us, forward, backward),
        eager=_span(eager_us, *eager_kernels(dtype)),
    )


def inputs(shape: tuple[int, ...], dtype: DType) -> list[Tensor]:
    """x, weight, bias, scale and shift, each a leaf; scale and shift as halves of a chunk."""
    N, C = shape[:2]
    modulation = torch.randn(N, 2 * C, dtype=DTYPES[dtype])
    leaves = [torch.randn(shape, dtype=DTYPES[dtype]), torch.ones(C), torch.zeros(C)]
    return [leaf.requires_grad_() for leaf in (*leaves, *modulation.chunk(2, dim=1))]


def _fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return group_norm_silu(x, GROUPS, weight, bias, scale, shift)


def eager_call(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The reference's chain: GroupNorm32, scale-shift, SiLU."""
    h = F.group_norm(x.float(), GROUPS, weight, bias, 1e-5).to(x.dtype)
    return F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def kernels_launched(given: Sequence[Tensor]) -> tuple[int, int]:
    """By our forward and backward."""
    with recording() as launched:
        y = _fused(*given)
        forward = len(launched)
        torch.autograd.grad(y, given, torch.ones_like(y))
    return forward, len(launched) - forward


def eager_kernels(dtype: DType) -> tuple[int, int]:
    """By eager's forward and backward; the halves of a chunk are joined outside of the call."""
    from resblock_bench.bench.compiled.norms import Norm

    from .eager_chain import eager_chain

    N, C, *positions = SHAPE
    norm = Norm(
        batch=N,
        channels=C,
        positions=torch.Size(positions).numel(),
        groups=GROUPS,
        dtype=dtype,
        layout="nchw",
        modulation="scale_shift",
        bias_folded=False,
        dropout=0.0,
    )
    forward, backward = (
        [kernel for kernel in eager_chain(norm, way) if kernel.name != "scale and shift joined"]
        for way in ("forward", "backward")
    )
    return len(forward), len(backward)


def _in_turns(*calls: tuple[Callable[..., Tensor], list[Tensor]]) -> list[list[tuple[float, ...]]]:
    """Of each call the seconds of forward and backward, every round."""
    gradients = [torch.ones_like(given[0]) for _, given in calls]
    samples: list[list[tuple[float, ...]]] = [[] for _ in calls]
    for i in range(WARMUP + ROUNDS):
        for (call, given), dy, taken in zip(calls, gradients, samples, strict=True):
            times = [_seconds(call, given, dy) for _ in range(TURN)]
            if i >= WARMUP:
                taken += times
    return samples


def _seconds(call: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> tuple[float, ...]:
    """Of the forward, the backward and both."""
    start = time.perf_counter()
    y = call(*given)
    middle = time.perf_counter()
    torch.autograd.grad(y, given, dy)
    end = time.perf_counter()
    return middle - start, end - middle, end - start


def _span(samples: list[tuple[float, ...]], forward: int, backward: int) -> Span:
    median: Any = [1e6 * statistics.median(column) for column in zip(*samples, strict=True)]
    return Span(
        forward_us=median[0],
        backward_us=median[1],
        both_us=median[2],
        forward_kernels=forward,
        backward_kernels=backward,
    )
