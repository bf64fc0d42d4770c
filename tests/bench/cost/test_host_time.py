"""The host's time of a call: what is measured, and that it is the whole of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import process_functions
from support.kept_workers import KeptWorkers
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from resblock_bench.bench.cost.host_time import SHAPE, SMALLEST, eager_call, eager_kernels, inputs
from resblock_bench.bench.machine.workers import Job
from resblock_bench.bench.records import DType

pytestmark = pytest.mark.slow

# Of ATen's CUDA sources: what one operator launches, where that is not one kernel.
KERNELS = {"native_group_norm": 3, "native_group_norm_backward": 5}
VIEWS = {"detach", "slice", "unsqueeze", "squeeze", "expand", "view", "alias", "select", "t"}


class Dispatched(TorchDispatchMode):
    """The names of all operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def dispatched(shape: tuple[int, ...], dtype: DType) -> tuple[list[str], list[str]]:
    """By eager's forward and backward."""
    given = inputs(shape, dtype)
    dy = torch.ones_like(given[0])
    with Dispatched() as forward:
        y = eager_call(*given)
    with Dispatched() as backward:
        torch.autograd.grad(y, given, dy)
    return forward.names, backward.names


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_smallest_eager_call_dispatches_what_the_full_one_does(dtype: DType) -> None:
    assert dispatched(SMALLEST, dtype) == dispatched(SHAPE, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_eagers_kernels_are_those_of_its_operators(dtype: DType) -> None:
    counts = [
        sum(KERNELS.get(name, 1) for name in names if name not in VIEWS)
        for names in dispatched(SHAPE, dtype)
    ]
    assert tuple(counts) == eager_kernels(dtype)


def test_the_time_of_a_call_is_measured_without_a_gpu(kept_workers: KeptWorkers) -> None:
    """Launches are counted, and times are of what ran: both include the autograd of each."""
    found = kept_workers.ask(Job(False, process_functions.host_time, ())).get()
    assert (found.ours.forward_kernels, found.ours.backward_kernels) == (1, 1)
    for span in (found.ours, found.eager):
        assert span.forward_us > 0 and span.backward_us > 0
        assert span.both_us >= max(span.forward_us, span.backward_us)
