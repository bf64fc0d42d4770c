from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.running import Runner, run_operator

from resblock_bench.kernels import dispatch


@pytest.fixture(params=["aten", "A", "B", "C"])
def run(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The operator in ATen, and in Triton's interpreter in each tier (D launches as C does)."""
    if request.param == "aten":
        with dispatch.prefer("aten"):
            yield run_operator
        return
    pytest.importorskip("triton")
    with dispatch.prefer("triton", request.param):
        yield run_operator


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty is full of NaN, so an element that nobody writes is noticed. Each test draws the
    same numbers, whichever ran before it."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
