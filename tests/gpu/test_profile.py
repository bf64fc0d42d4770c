"""A recorded step of a GPU: its kernels, what they belong to, and its memory."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from support.cells import TINY

from resblock_bench.bench.measure.devices import open_device
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.profile import trace
from resblock_bench.bench.profile.events import slices_of
from resblock_bench.bench.profile.step import counted_step, recorded_step
from resblock_bench.kernels import dispatch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.interpreting(),
    reason="needs a GPU, and no interpreter",
)


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_every_kernel_belongs_to_a_module_and_a_pass(
    mode: str, impl: str, checkpoint: str, tmp_path: Path
) -> None:
    if mode == "inference" and checkpoint != "none":
        pytest.skip("there is no such cell")
    sizes = {"channels": 64, "out_channels": 64, "resolution": 32, "emb_channels": 64}
    cell = replace(TINY, mode=mode, impl=impl, checkpoint=checkpoint, dropout=0.1, **sizes)
    device = open_device("cuda", 1)
    workload = KINDS["block"].drawn(cell, device.torch_device, 0)
    recorded = recorded_step(workload, device, lambda: None)
    slices = slices_of(recorded.events)
    assert sum(one.ns for one in slices) in recorded.all_ns
    kernels = [one for one in slices if one.name is not None]
    assert {one.name for one in kernels if one.module is None} == set()
    groups = {(one.stage, one.group) for one in kernels}
    stages = {"forward", "backward"} if mode == "train" else {"forward"}
    assert {(stage, group) for stage in stages for group in ("convolution", "norm-act")} <= groups
    assert ("recompute", "convolution") in groups or checkpoint != "full"
    work = counted_step(workload, device)
    names = {one.name for one in work.operators}
    assert ("resblock_bench::group_norm_silu" in names) == (impl == "fused")
    assert trace.write(tmp_path / "trace.json.gz", recorded.events, 0) == 0
