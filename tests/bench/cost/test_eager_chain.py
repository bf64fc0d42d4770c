"""Eager's kernels as listed, against the operators that PyTorch dispatches; and their bytes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from support.norms import norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resblock_bench.bench.compiled.norms import DIRECTIONS, LEAST_PASSES, Direction, Norm
from resblock_bench.bench.cost.eager_chain import (
    ChainKernel,
    compiled_chain,
    eager_chain,
    predict_chain,
)
from resblock_bench.bench.cost.gpu_figures import GPUS
from resblock_bench.bench.measure.workload import DTYPES

GROUP_NORM = {
    "aten.native_group_norm.default": ["RowwiseMoments", "ComputeFusedParams", "affine"],
    "aten.native_group_norm_backward.default": [
        "ComputeInternalGradients",
        "rstd·γ",
        "ComputeBackwardFusedParams",
        "dx",
        "GammaBetaBackward",
    ],
}
NO_KERNEL = ("aten.promote_types.default", "aten.ones_like.default")


class Recorder(TorchDispatchMode):
    """The operators that are no views, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = op(*args, **(kwargs or {}))
        if not op.is_view and str(op) not in NO_KERNEL:
            self.names.append(str(op))
        return out


def dispatched(n: Norm) -> dict[Direction, list[str]]:
    """As the reference's block computes it."""
    dtype = DTYPES[n.dtype]
    x = torch.empty(2, 64, 4, 4, device="meta", dtype=dtype, requires_grad=True)
    weight, bias = (torch.empty(64, device="meta", requires_grad=True) for _ in range(2))
    width = 128 if n.modulation == "scale_shift" else 64
    emb = torch.empty(2, width, 1, 1, device="meta", dtype=dtype, requires_grad=True)
    with Recorder() as forward:
        h: Tensor = x + emb if n.modulation == "add" else x
        h = F.group_norm(h.to(torch.float32), 32, weight, bias).to(dtype)
        if n.modulation == "scale_shift":
            scale, shift = emb.chunk(2, dim=1)
            h = h * (1 + scale) + shift
        y = F.silu(h)
    with Recorder() as backward:
        torch.autograd.backward(y, torch.ones_like(y))
    return {"forward": forward.names, "backward": backward.names}


@pytest.mark.parametrize("modulation", ["none", "scale_shift", "add"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_kernel_for_every_operator(dtype: str, modulation: str) -> None:
    n = norm(dtype=dtype, modulation=modulation)
    for direction, names in dispatched(n).items():
        chain = [kernel.name for kernel in eager_chain(n, direction)]
        count = sum(len(GROUP_NORM.get(name, [name])) for name in names)
        assert len(chain) == count, (names, chain)
        (own,) = [GROUP_NORM[name] for name in names if name in GROUP_NORM]
        start = chain.index(own[0])
        assert chain[start : start + len(own)] == own


def passes(chain: list[ChainKernel]) -> float:
    return sum(kernel.first + kernel.again + kernel.written for kernel in chain)


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        # fp32: statistics 1, affine 2, times, plus and SiLU 2 each; SiLU 3, two sums, two
        # products 5, then sums 2 and dx 3.
        ({"dtype": "fp32"}, 9, 15),
        # 16 bits: the norm in fp32 moves twice as much, and x, y, dy and dx are converted.
        ({"dtype": "bf16"}, 3 + 6 + 3 + 6, 3 + 1 + 2 + 3 + 1 + 3 + 10 + 3),
        ({"dtype": "fp32", "modulation": "none"}, 5, 8),
        ({"dtype": "fp32", "modulation": "add"}, 7, 9),
        # Channels-last: x made contiguous, in the backward dy and x.
        ({"dtype": "fp32", "layout": "nhwc"}, 11, 19),
        # The mask of dropout is a byte an element.
        ({"dtype": "fp32", "dropout": 0.1}, 11.25, 17.25),
    ],
)
def test_passes_of_eager(changes: dict[str, Any], forward: float, backward: float) -> None:
    n = norm(**changes)
    assert passes(eager_chain(n, "forward")) == forward
    assert passes(eager_chain(n, "backward")) == backward


def test_passes_of_torch_compile() -> None:
    assert passes(compiled_chain(norm(), "forward")) == 3
    assert passes(compiled_chain(norm(), "backward")) == 5


def test_x_is_read_from_memory_once() -> None:
    for dtype in ("bf16", "fp32"):
        for layout in ("nchw", "nhwc"):
            first = [
                kernel.first for kernel in eager_chain(norm(dtype=dtype, layout=layout), "forward")
            ]
            assert sum(first) == 1


def test_the_time_of_a_large_chain_is_its_bytes() -> None:
    """8·512·512² in fp32, 4 GiB: nothing stays in L2, and 7 launches are nothing."""
    n = norm(dtype="fp32", channels=512, positions=2**18)
    found = predict_chain(eager_chain(n, "forward"), n, GPUS[90])
    assert found.bound == "memory"
    assert found.us == pytest.approx(9 * 8 * 512 * 2**18 * 4 / 3e12 * 1e6, rel=0.01)


def test_the_time_of_a_small_chain_is_its_launches() -> None:
    n = norm(positions=16, dtype="fp32", batch=1)
    chain = eager_chain(n, "forward")
    found = predict_chain(chain, n, GPUS[90])
    assert found.bound == "start"
    # Each waits for the one before: from L2, but for the first, which reads x.
    gpu = GPUS[90]
    start = 7 * gpu.launch_us + gpu.memory_latency_us + 6 * gpu.l2_latency_us
    assert found.us == pytest.approx(start, rel=0.02)


def test_what_fits_l2_is_read_again_from_there() -> None:
    """Two passes of 2 MB: the second reads at L2's rate. Beyond L2, at memory's."""
    chain = [ChainKernel("a", first=1, written=0), ChainKernel("b", again=1, written=1)]
    small, large = norm(positions=512), norm(positions=2**18)
    gpu = GPUS[90]._replace(launch_us=0.0, memory_latency_us=0.0, l2_latency_us=0.0)
    image = 8 * 256 * 2
    us = predict_chain(chain, small, gpu).us
    assert us == pytest.approx(2 * image * 512 / 3e12 * 1e6)  # the write hides the read from L2
    us = predict_chain(chain, large, gpu).us
    assert us == pytest.approx(3 * image * 2**18 / 3e12 * 1e6)


def test_no_chain_moves_less_than_the_floor() -> None:
    for direction in DIRECTIONS:
        for modulation in ("none", "scale_shift", "add"):
            n = norm(modulation=modulation, dtype="fp32")
            assert passes(eager_chain(n, direction)) > passes(compiled_chain(n, direction))
            assert passes(compiled_chain(n, direction)) > LEAST_PASSES[direction]
