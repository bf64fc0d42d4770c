"""Small calls of the operator at fixed seeds, and how far their results are from float64.

    error(t) = ‖t − t64‖ / ‖t64‖

for the output and every gradient, of this project's operator and of eager PyTorch on the same
inputs. Some inputs lie 100 or 1000 standard deviations from zero, where statistics in the form
E[x²] − μ² lose four to six digits more than centred ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resblock_bench.bench.measure import operator
from resblock_bench.bench.measure.correctness import limit, relative_errors
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.bench.records import Conditioning, DType, Layout
from resblock_bench.kernels.dispatch import Backend, prefer
from resblock_bench.kernels.functional import group_norm_silu
from resblock_bench.kernels.spec import Modulation
from resblock_bench.kernels.tiers import Tier

RESULTS = ("y", "dx", *(f"d{name}" for name in Modulation._fields))
GROUPS = 4
_CHANNELS = 32


class AccuracyCase(NamedTuple):
    """One call: (samples, 32 channels, size, size) in 4 groups, forward and backward.

    tier: of the interpreted Triton kernels, None for the path in PyTorch's own. mean: of x, whose
    standard deviation is 1. conditioning: scale and shift, or an add before the norm.
    """

    tier: Tier | None
    dtype: DType
    layout: Layout
    conditioning: Conditioning
    mean: float
    samples: int
    size: int

    @property
    def name(self) -> str:
        at = f" mean {self.mean:g}σ" if self.mean else ""
        return f"{self.samples}×{self.size}² {self.dtype} {self.layout} {self.conditioning}{at}"


class Errors(NamedTuple):
    """Of each result by name: the operator's error, eager PyTorch's, and what is allowed."""

    ours: dict[str, float]
    eager: dict[str, float]
    limits: dict[str, float]


def measure(case: AccuracyCase) -> Errors:
    """Run a case. A tier needs TRITON_INTERPRET=1 before the kernels are imported."""
    dtype = DTYPES[case.dtype]
    inputs = operator.draw(
        (case.samples, _CHANNELS, case.size, case.size),
        GROUPS,
        dtype,
        channels_last=case.layout == "nhwc",
        scale_shift=case.conditioning == "scale_shift",
        pre_shift=case.conditioning == "add",
        mean=case.mean,
    )
    truth = operator.in_parts(operator.gradients, inputs, torch.float64)
    scales = {name: float(tensor.norm()) for name, tensor in truth.items()}
    backend: Backend = "aten" if case.tier is None else "triton"
    # Interpreted, lanes beyond the end of a group overflow on their way to being masked.
    with prefer(backend, case.tier), np.errstate(over="ignore"):
        found = operator.gradients(inputs, _ours)
    eager = relative_errors(operator.gradients(inputs), truth, scales)
    limits = {name: limit(error, dtype) for name, error in eager.items()}
    return Errors(relative_errors(found, truth, scales), eager, limits)


def _ours(x: Tensor, m: Modulation, groups: int) -> Tensor:
    return group_norm_silu(
        x, groups, m.weight, m.bias, m.scale, m.shift, pre_shift=m.pre_shift, eps=operator.EPS
    )
