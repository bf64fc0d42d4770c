"""Repeated launches: the driver gets from them what it gets from kernel[grid](**arguments).

Kernels are compiled for this, and here they are interpreted: a worker process runs the checks.
"""

from __future__ import annotations

import pytest
from support.kept_workers import KeptWorkers

from resblock_bench.bench.machine.workers import Job
from resblock_bench.kernels.dispatch import standing_for_gpu

pytest.importorskip("triton")
launched = pytest.importorskip("support.launched")

CHECKS = (
    "repeated", "values", "alignment", "scratch", "device_and_stream", "hooks", "debugging",
    "patched", "changed_source", "autotuned", "threads", "recorded", "operator",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_repeated_launch_is_that_of_kernel_grid(kept_workers: KeptWorkers, name: str) -> None:
    kept_workers.ask(Job(False, getattr(launched, name), ())).get()


def test_interpreted_kernels_are_not_launched_on_an_idle_driver() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"), standing_for_gpu():
        pass
