"""What is predicted of one direction of one norm: the fused kernels beside eager and compiled."""

from __future__ import annotations

from collections.abc import Sequence

from resblock_bench.bench.compiled.machine_code import KernelCode
from resblock_bench.bench.compiled.norms import (
    LEAST_PASSES,
    Direction,
    Norm,
    Traffic,
    compile_kernel,
    kernels_of,
    launch_of,
)
from resblock_bench.bench.records import Record
from resblock_bench.kernels.tiers import Launch

from .eager_chain import activation_bytes, compiled_chain, eager_chain, predict_chain
from .expected_traffic import expected_traffic
from .gpu_figures import GPUS, GpuFigures
from .launch_work import launch_work
from .predict_time import Bound, predict_call


class Predicted(Record, frozen=True, kw_only=True):
    """Predicted, not measured: microseconds of one direction, cold caches.

    us, bound, shares_us    of the fused kernels, as in predict_time.Prediction
    floor_us, floor_share   the least passes at copy bandwidth, and their share of `us`
    larger_than_l2          whether the tensors read and written exceed L2: else a floor that counts
                            memory alone says little
    eager_us, compiled_us   of the chains that the fused kernels replace, taken at their best
    eager_kernels           launches of eager's chain
    host_us                 what the host was said to take for the fused call, or None
    """

    us: float
    bound: Bound
    shares_us: dict[Bound, float]
    floor_us: float
    floor_share: float
    larger_than_l2: bool
    eager_us: float
    eager_kernels: int
    compiled_us: float
    host_us: float | None


def predict_compiled(norm: Norm, direction: Direction, arch: int, gpu: GpuFigures) -> Predicted:
    """Predict a direction whose kernels this process compiles, with the traffic of the rules."""
    launch = launch_of(norm, direction, arch, None)
    names = kernels_of(norm, direction, launch)
    kernels = [compile_kernel(norm, direction, launch, arch, name) for name in names]
    traffic = expected_traffic(norm, direction, launch)
    return predict(norm, direction, arch, launch, traffic, kernels, gpu=gpu)


def predict(
    norm: Norm,
    direction: Direction,
    arch: int,
    launch: Launch,
    traffic: Traffic,
    kernels: Sequence[KernelCode],
    *,
    host_us: float | None = None,
    gpu: GpuFigures | None = None,
) -> Predicted:
    """Predict a direction on the GPU that stands for an architecture, or on `gpu`."""
    gpu = gpu or GPUS[arch]
    own = predict_call(launch_work(norm, direction, launch, traffic, kernels), gpu, host_us)
    eager = eager_chain(norm, direction)
    passes = LEAST_PASSES[direction]
    floor_us = 1e6 * passes * activation_bytes(norm) / gpu.copy_bytes_per_s
    return Predicted(
        us=own.us,
        bound=own.bound,
        shares_us=own.shares_us,
        floor_us=floor_us,
        floor_share=floor_us / own.us,
        larger_than_l2=passes * activation_bytes(norm) > gpu.l2_bytes,
        eager_us=predict_chain(eager, norm, gpu).us,
        eager_kernels=len(eager),
        compiled_us=predict_chain(compiled_chain(norm, direction), norm, gpu).us,
        host_us=host_us,
    )
