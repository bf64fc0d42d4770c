"""What the kernels touch and what they compile to, at the sizes and rules they really run with."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from support.kept_workers import KeptWorkers
from support.norms import norm

from resblock_bench.bench.compiled import norms as norm_cost
from resblock_bench.bench.compiled.machine_code import KernelCode
from resblock_bench.bench.compiled.norms import (
    Direction,
    Norm,
    compile_kernel,
    count_traffic,
    kernels_of,
    launch_of,
)
from resblock_bench.bench.machine.workers import Job
from resblock_bench.kernels.tiers import Choice, Launch, Machine, Tier, shape

pytestmark = pytest.mark.slow


def counted(n: Norm, direction: Direction, tier: Tier | None = None) -> norm_cost.Traffic:
    return count_traffic(n, direction, launch_of(n, direction, 90, tier))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("tier", "asked", "from_memory"),
    [("A", (2, 3), (2, 3)), ("B", (3, 5), (2, 3)), ("C", (3, 5), (2, 3)), ("D", (3, 5), (3, 5))],
)
def test_passes_of_each_tier(
    tier: Tier, asked: tuple[int, int], from_memory: tuple[int, int], layout: str
) -> None:
    """Second reads are shown; A, B and C are at the floor, D is not."""
    n = norm(positions=64, channels=128, layout=layout)
    for direction, requested, dram in zip(("forward", "backward"), asked, from_memory, strict=True):
        found = counted(n, direction, tier)
        assert found.requested == pytest.approx(requested)
        assert found.dram == pytest.approx(dram)
        assert found.sector_efficiency == 1.0


@pytest.mark.parametrize(
    ("channels", "positions"),
    [(192, 2048), (256, 2044), (192, 2044)],
    ids=["channels beside the slab", "a part of a tile", "both"],
)
def test_a_tile_loaded_ahead_is_one_of_the_part(channels: int, positions: int) -> None:
    """Nothing past a part is read, whichever mask the loads have."""
    n = norm(channels=channels, positions=positions, layout="nhwc")
    launch = launch_of(n, "backward", 90, "C")
    assert counted(n, "backward", "C").requested == pytest.approx(5.0)
    assert (positions % launch.block_hw == 0) == (positions == 2048)
    assert (launch.slab % launch.block_c == 0) == (channels == 256)


def test_rewriting_is_one_read_and_one_write() -> None:
    found = counted(norm(positions=64), "rewrite")
    assert found.requested == found.dram == pytest.approx(2.0)


@pytest.mark.parametrize("channels", [192, 320, 576, 960, 1344])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_channels_last_rows_are_whole_sectors(channels: int, dtype: str) -> None:
    """C/G of 6, 10, 18, 30 and 42, none of which fills a sector."""
    n = norm(channels=channels, positions=64, layout="nhwc", dtype=dtype)
    assert counted(n, "forward").sector_efficiency == 1.0


def test_rows_that_are_no_whole_sectors_are_seen() -> None:
    n = norm(channels=96, groups=32, positions=49, layout="nchw", modulation="none")
    assert counted(n, "forward").sector_efficiency < 0.95


def test_small_tensors_are_counted_and_shared_by_the_samples() -> None:
    """Scale and shift are read for every sample, 8 bytes a channel; the rest once for all."""
    n = norm(positions=64, batch=1)
    activation = 64 * 2
    # weight, bias, scale, shift, pre_shift; mean and rstd of every eighth channel.
    assert counted(n, "forward").small == pytest.approx((5 * 4 + 1) / activation)
    many = counted(norm(positions=64, batch=1000), "forward").small
    assert many == pytest.approx((2 * 4 + 1) / activation, rel=1e-2)


def test_a_shortened_count_is_that_of_the_full_size() -> None:
    """Two tiles a program stand for many, in tier C with several programs to a group."""
    n = norm(batch=1, channels=4, groups=2, positions=9 * 4096, modulation="none")
    launch = shape("forward", n.problem, Machine(1, 50 * 2**20), Choice("C", 1024, 2, 1, 8))
    assert launch.splits > 1 and launch.tiles > 2
    full = count_traffic(n, "forward", launch)
    norm_cost._COUNTED_ELEMENTS, before = 1, norm_cost._COUNTED_ELEMENTS
    try:
        short = count_traffic(n, "forward", launch)
    finally:
        norm_cost._COUNTED_ELEMENTS = before
    assert short.requested == pytest.approx(full.requested)
    assert short.dram == pytest.approx(full.dram)
    assert short.small == pytest.approx(full.small)
    assert short.sector_efficiency == pytest.approx(full.sector_efficiency)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_many_parts_count_as_two_smaller_numbers_of_them_say(direction: Direction) -> None:
    n = norm(batch=1, channels=64, groups=2, positions=40 * 64, layout="nhwc")
    launch = shape(direction, n.problem, Machine(80, 50 * 2**20), Choice("C", 2048, 4, 1, 1))
    assert launch.splits > 2 * norm_cost._COUNTED_SPLITS
    found, full = count_traffic(n, direction, launch), norm_cost._counted(n, direction, launch)
    assert found.small == pytest.approx(full.small)
    assert found.requested == pytest.approx(full.requested)
    assert found.dram == pytest.approx(full.dram)


def compiled(
    workers: KeptWorkers, n: Norm, direction: Direction, launch: Launch, arch: int
) -> list[KernelCode]:
    how = (n, direction, launch)
    jobs = [Job(False, compile_kernel, (*how, arch, name)) for name in kernels_of(*how)]
    return [workers.ask(job).get() for job in jobs]


CASES = [
    # Every tier and layout, and the widest slab (C/G = 42), on all three architectures in turn.
    (80, norm(positions=64, layout="nchw", dtype="fp16"), "A"),
    (90, norm(positions=256, channels=320, layout="nhwc"), "B"),
    (100, norm(positions=4096, layout="nchw", dropout=0.1), "C"),
    (90, norm(positions=256, channels=1344, layout="nhwc"), "C"),
    (80, norm(positions=4096, channels=384, layout="nhwc", dtype="fp32"), "D"),
    (90, norm(positions=1024, layout="nchw", dtype="fp32", modulation="add"), None),
]


@pytest.mark.parametrize(
    ("arch", "n", "tier"), CASES, ids=[f"{a}-{n.layout}-{n.dtype}-{t}" for a, n, t in CASES]
)
def test_machine_code(kept_workers: KeptWorkers, arch: int, n: Norm, tier: Tier | None) -> None:
    """It compiles (which the interpreter does not show), spills nothing, moves 128 bits a time."""
    for direction in norm_cost.DIRECTIONS:
        launch = launch_of(n, direction, arch, tier)
        kernels = compiled(kept_workers, n, direction, launch, arch)
        names = [kernel.kernel for kernel in kernels]
        # One launch a direction, whatever the tier.
        assert len(names) == 1 and kernels[0].launches == 1
        if launch.split and direction != "rewrite":
            assert names[0].endswith("split")
        for kernel in kernels:
            code = kernel.code
            assert code.spill_store_bytes == code.spill_load_bytes == code.stack_bytes == 0
            assert code.shared_bytes <= 48 * 1024
            assert max(code.main_loads) == 128
            assert max(code.main_stores, default=128) == 128
            if launch.split:
                assert set(code.main_loads) | set(code.main_stores) == {128} or n.dropout


def test_each_loop_has_its_own_instructions(kept_workers: KeptWorkers) -> None:
    """Tier B forward has two: statistics without exponentials, then output with them."""
    n = norm(positions=4096)
    (whole,) = compiled(kept_workers, n, "forward", launch_of(n, "forward", 90, "B"), 90)
    statistics, output = whole.code.loops
    assert statistics["mufu"] < 1 < output["mufu"]
    assert statistics["total"] < output["total"]
    for name, total in whole.code.instructions.items():
        assert statistics[name] + output[name] == pytest.approx(total)
