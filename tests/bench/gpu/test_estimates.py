"""How long a run is expected to take on an H100: what counts, and that constants are what they
were counted as."""

import pytest
import torch

from resblock_bench.bench.gpu import estimates
from resblock_bench.bench.gpu.estimates import MODELS, estimate
from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.measure.floor import floor_of
from resblock_bench.bench.records import Ceilings
from resblock_bench.reference import build

BLOCK = ("channels=256", "resolution=256", "batch=8", "dtype=bf16", "checkpoint=none,full")


def test_a_run_is_its_start_its_truths_and_its_variants() -> None:
    found = estimate([*BLOCK, "impl=reference,fused"], 2.0)
    one_more = estimate([*BLOCK, "impl=reference,fused,twin"], 2.0)
    truth_bytes = 8 * (2 * 8 * 256 * 256**2 + 2 * 9 * 256**2)
    held_s = 2 * truth_bytes / estimates.TRUTH_BYTES_PER_S
    variant_s = estimates.VARIANT_S + 2 * estimates.SAMPLINGS + held_s
    assert one_more.run - found.run == pytest.approx(2 * variant_s)  # none and full
    operations = 3 * 2 * 8 * 2 * 9 * 256**2 * 256**2
    truths_s = 2 * operations / estimates.FLOAT64_FLOPS_PER_S + held_s
    assert found.run == found.first == pytest.approx(estimates.START_S + truths_s + 4 * variant_s)
    assert found.cell == pytest.approx(max(truths_s, variant_s))


def test_torch_compile_takes_longer_and_may() -> None:
    plain, compiled = (estimate([*BLOCK, f"impl={impl}"], 1.0) for impl in ("fused", "compiled"))
    assert compiled.run - plain.run == pytest.approx(2 * estimates.COMPILE_S)
    assert compiled.cell - plain.cell == pytest.approx(estimates.COMPILE_S)


def test_the_first_rows_of_several_blocks_are_those_of_one() -> None:
    axes = ["model=adm-imagenet256-cond", "resolution=128", "channels=256", "out_channels=256"]
    found = estimate([*axes, "batch=8", "checkpoint=none"], 1.0)  # also up and down
    start = estimates.START_S
    assert found.first - start < (found.run - start) / 2


def test_operations_of_a_block_are_those_of_its_floor() -> None:
    for axes in (["channels=64", "resolution=32"], ["channels=64", "out_channels=128"]):
        (item,) = plan([parse_arguments([*axes, "batch=4", "checkpoint=none", "impl=reference"])])
        ceilings = Ceilings(
            copy_bytes_per_s=1e9, peak_bytes_per_s=1e9, matrix_flops_per_s={"fp32": 1e9},
            disturbances=[],
        )  # fmt: skip
        counted = floor_of(item.cell, ceilings, None).flops
        assert estimates._work(item.cell).operations == pytest.approx(counted, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["adm-imagenet64-cond", "adm-upsample-64-256"])
def test_operations_and_parameters_of_a_model_are_as_counted(model: str) -> None:
    axes = ["workload=model", f"model={model}", "batch=1", "impl=reference", "checkpoint=none"]
    (item,) = plan([parse_arguments(axes)])
    ceilings = Ceilings(
        copy_bytes_per_s=1e9, peak_bytes_per_s=1e9, matrix_flops_per_s={"fp32": 1e9},
        disturbances=[],
    )  # fmt: skip
    operations, parameters = MODELS[model]
    assert floor_of(item.cell, ceilings, None).flops == pytest.approx(operations, rel=0.01)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(model).parameters()) == parameters
