"""What a launch asks for, by its phase; and what is predicted of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("triton")

from support.norms import norm

from resblock_bench.bench.compiled.kernel_key import compile_key
from resblock_bench.bench.compiled.machine_code import KernelCode, MachineCode
from resblock_bench.bench.compiled.norms import (
    LEAST_PASSES,
    Direction,
    Traffic,
    count_traffic,
    kernels_of,
    launch_of,
)
from resblock_bench.bench.cost.expected_traffic import expected_traffic
from resblock_bench.bench.cost.gpu_figures import GPUS
from resblock_bench.bench.cost.launch_work import launch_work
from resblock_bench.bench.cost.predict_time import LaunchWork
from resblock_bench.bench.cost.predictions import predict
from resblock_bench.bench.cost.published_norms import groups_of, published_norms
from resblock_bench.kernels.tiers import Launch, Tier
from resblock_bench.reference import PUBLISHED, resblock_sites

pytestmark = pytest.mark.slow


def code(kernel: str, launches: int, programs: int, *loops: tuple[float, float]) -> KernelCode:
    """Instructions and special ones of each loop; half of a multiprocessor in 8 warps."""
    found = [{"total": total, "mufu": special} for total, special in loops]
    return KernelCode(
        kernel=kernel,
        launches=launches,
        programs=programs,
        code=MachineCode(
            arch=90,
            warps=8,
            registers=64,
            stack_bytes=0,
            spill_store_bytes=0,
            spill_load_bytes=0,
            shared_bytes=0,
            occupancy=0.5,
            occupancy_limit="registers",
            loads={},
            stores={},
            main_loads={},
            main_stores={},
            instructions={name: sum(loop[name] for loop in found) for name in ("total", "mufu")},
            loops=found,
            sass_hash="",
        ),
    )


def launch(tier: Tier, **changes: Any) -> Launch:
    """A slab of 8 channels, in tiles of 2 by 2048, 32 of them a split."""
    fields: dict[str, Any] = {
        "tier": tier,
        "slab": 8,
        "block_c": 2,
        "block_hw": 2048,
        "splits": 1,
        "tiles": 32,
        "lag": 4,
        "num_warps": 8,
        "reason": "",
    }
    return Launch(**fields | changes)


def traffic(requested: float, dram: float, floor: int, efficiency: float = 1.0) -> Traffic:
    return Traffic(
        requested=requested,
        dram=dram,
        small=0.25,
        floor=floor,
        sector_efficiency=efficiency,
        rule="",
    )


LARGE = norm(positions=65536)
IMAGE = 8 * 256 * 65536 * 2
SPLIT = [code("backward: split", 1, 2048, (18, 2), (19, 2))]


def moved(works: Sequence[LaunchWork]) -> list[tuple[float, float, float]]:
    """Passes read, written and read from L2, of all launches of each kernel."""
    return [
        tuple(
            work.launches * sum(getattr(part, name) for part in work.parts) / IMAGE
            for name in ("read_bytes", "written_bytes", "l2_bytes")
        )  # type: ignore[misc]
        for work in works
    ]


def test_the_last_tier_reads_again_from_memory() -> None:
    works = launch_work(LARGE, "backward", launch("D"), traffic(5, 5, 3), SPLIT)
    assert moved(works) == [(4, 1.25, 0)]


def test_one_program_a_unit_does_all_of_it() -> None:
    whole = [code("forward: whole", 1, 256, (8, 0), (16, 2))]
    shape = launch("B", slab=8, block_c=8, block_hw=512, tiles=128)
    (work,) = launch_work(LARGE, "forward", shape, traffic(3, 2, 2), whole)
    assert moved([work]) == [(1, 1.25, 1)]
    (part,) = work.parts
    assert part.instructions == pytest.approx((8 + 16) * IMAGE / 2)
    assert part.in_flight_bytes == 8 * 512 * 2


def test_a_launch_with_tickets_has_two_kinds_of_programs() -> None:
    """As many sums as apply programs, and the counted bytes divided among them."""
    (work,) = launch_work(LARGE, "backward", launch("C"), traffic(5, 3, 3), SPLIT)
    assert moved([work]) == [(2, 1.25, 2)]
    sums, apply = work.parts
    assert (sums.programs, apply.programs) == (1024, 1024)
    assert (sums.read_bytes, sums.l2_bytes) == (2 * IMAGE, 0)
    assert (apply.read_bytes, apply.l2_bytes) == (0, 2 * IMAGE)
    assert sums.instructions == pytest.approx(18 * IMAGE / 2)
    assert apply.instructions == pytest.approx(19 * IMAGE / 2)
    assert apply.special == pytest.approx(2 * IMAGE / 2)
    # x and dy of a tile.
    assert sums.in_flight_bytes == apply.in_flight_bytes == 2 * 2 * 2048 * 2
    assert apply.round_trips > sums.round_trips


def test_padded_lanes_execute_and_load_nothing() -> None:
    """A slab of six channels in tiles of four: a quarter of the lanes has no channel."""
    shape = launch("D", slab=6, block_c=4, block_hw=1024, tiles=64)
    n = norm(channels=192, positions=65536)
    kernels = [code("forward: split", 1, 1024, (8, 0), (16, 2))]
    (work,) = launch_work(n, "forward", shape, traffic(3, 3, 2), kernels)
    part, _ = work.parts
    assert part.in_flight_bytes == pytest.approx(0.75 * 4 * 1024 * 2)
    assert part.instructions == pytest.approx(8 * 8 * 192 * 65536 / 0.75)


def test_positions_past_the_end_load_nothing() -> None:
    """A map of 48 positions in a tile of 64, held in registers."""
    n = norm(positions=48)
    shape = launch("A", block_c=8, block_hw=64, tiles=1)
    whole = [code("forward: resident", 1, 256, (30, 2))]
    (work,) = launch_work(n, "forward", shape, traffic(2, 2, 2), whole)
    (part,) = work.parts
    assert part.in_flight_bytes == pytest.approx(8 * 48 * 2)
    assert part.instructions == 30 * 256 * 8 * 64
    assert part.read_bytes / part.programs == pytest.approx(part.in_flight_bytes)  # one turn


def test_sectors_fetched_in_part_count_whole() -> None:
    works = launch_work(LARGE, "backward", launch("C"), traffic(5, 3, 3, efficiency=0.5), SPLIT)
    assert moved(works) == [(4, 2.25, 4)]
    assert works[0].parts[0].in_flight_bytes == 2 * 2 * 2 * 2048 * 2


def predicted(kernels: list[KernelCode], **how: Any) -> Any:
    return predict(LARGE, "backward", 90, launch("C"), traffic(5, 3, 3), kernels, **how)


def test_the_floor_is_the_least_bytes_at_copy_bandwidth() -> None:
    found = predicted(SPLIT)
    assert found.floor_us == pytest.approx(3 * IMAGE / 3e12 * 1e6)
    assert found.floor_share == pytest.approx(found.floor_us / found.us)
    assert found.larger_than_l2
    assert found.us == pytest.approx(sum(found.shares_us.values()))
    fast = GPUS[90]._replace(copy_bytes_per_s=6e12)
    assert predicted(SPLIT, gpu=fast).floor_us == pytest.approx(found.floor_us / 2)


def test_a_slow_host_bounds_the_call() -> None:
    found = predicted(SPLIT, host_us=1e5)
    assert (found.us, found.bound, found.host_us) == (1e5, "host", 1e5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("modulation", ["none", "scale_shift", "add"])
@pytest.mark.parametrize("tier", ["A", "B", "C", "D"])
def test_the_traffic_expected_is_the_traffic_counted(
    tier: Tier, modulation: str, layout: str
) -> None:
    n = norm(
        positions=64,
        channels=128,
        layout=layout,
        modulation=modulation,
        bias_folded=modulation != "none",
    )
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        how = launch_of(n, direction, 90, tier)
        counted, expected = count_traffic(n, direction, how), expected_traffic(n, direction, how)
        assert expected.dram == pytest.approx(counted.dram)
        assert expected.requested == pytest.approx(counted.requested)
        assert expected.sector_efficiency == pytest.approx(counted.sector_efficiency)
        assert expected.small == pytest.approx(counted.small, rel=0.1)
        assert expected.floor == LEAST_PASSES[direction]


def test_launches_that_compile_alike_have_one_key() -> None:
    """Another batch is the same code; another dtype, layout, size of group or tier is not."""

    def key(direction: Direction = "forward", **changes: Any) -> object:
        n = norm(**{"positions": 64, **changes})
        recorded = kernels_of(n, direction, launch_of(n, direction, 90, None))
        return compile_key(next(iter(recorded.values()))[0])

    assert key() == key(batch=16) == key(dropout=0.0)
    different = [
        key(),
        key(dtype="fp32"),
        key(layout="nhwc"),
        key(channels=512),
        key(dropout=0.1),
        key(modulation="none"),
        key(positions=63),
        key("backward"),
    ]
    assert len(set(different)) == len(different)


def test_an_int_counts_by_its_divisibility() -> None:
    n = norm(positions=64)
    recorded = kernels_of(n, "forward", launch_of(n, "forward", 90, None))
    (first, *_) = next(iter(recorded.values()))

    def key(C: int) -> object:
        return compile_key(first._replace(arguments={**first.arguments, "C": C}))

    assert key(256) == key(512)
    assert len({key(256), key(264), key(1), key(2**31)}) == 4


def test_groups_of_edm_have_four_channels_at_least() -> None:
    assert groups_of(PUBLISHED["edm-imagenet64-adm"], 64) == 16
    assert groups_of(PUBLISHED["edm-imagenet64-adm"], 192) == 32
    assert groups_of(PUBLISHED["adm-lsun256"], 64) == 32


def test_published_norms_are_those_of_the_models() -> None:
    norms = published_norms(8, "bf16", "nhwc")
    assert {(n.batch, n.dtype, n.layout) for n in norms} == {(8, "bf16", "nhwc")}
    # ADM at 256²: its first blocks, and EDM's narrow groups of four channels or more.
    assert any((n.channels, n.positions) == (256, 65536) for n in norms)
    assert all(n.channels % n.groups == 0 and n.groups <= 32 for n in norms)
    # Every block puts its input and its output through a norm.
    sites = [site for name in PUBLISHED for site in resblock_sites(name)]
    elements = 0
    for site in sites:
        factor = {"up": 4, "down": 0.25, "none": 1}[site.updown]
        elements += site.count * site.h * site.w * int(site.c_in + site.c_out * factor)
    assert sum(norms.values()) == elements
