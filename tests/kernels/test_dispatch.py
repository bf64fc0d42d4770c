"""Choosing an implementation and a tier: a pure function of shapes, checked without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.published import weighted_sites

from resblock_bench.kernels import dispatch, group_norm_silu, prefer, tiers
from resblock_bench.kernels.tiers import (
    Direction,
    Launch,
    Machine,
    Problem,
    ceil_div,
    plan_launch,
)

H100 = Machine(sms=132, l2_bytes=50 * 2**20)


def planned(
    direction: Direction, N: int, C: int, HW: int, tier: tiers.Tier | None = None, *,
    channels_last: bool = False, element_size: int = 2,
) -> Launch:  # fmt: skip
    return plan_launch(direction, Problem(N, C, HW, 32, channels_last, element_size), H100, tier)


def published_sites() -> list[tuple[int, int, int]]:
    """(C, HW, G) of every norm of every published block."""
    return [(C, HW, 32) for C, HW, _ in weighted_sites()]


@pytest.mark.parametrize("element_size", [2, 4], ids=["16 bit", "32 bit"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_published_site_is_covered_exactly(
    direction: Direction, channels_last: bool, element_size: int
) -> None:
    """Every channel and every position belongs to one program, and tiles stay in bounds."""
    for C, HW, G in published_sites():
        for N in (1, 64):
            launch = planned(
                direction, N, C, HW, channels_last=channels_last, element_size=element_size
            )
            assert launch.block_c & (launch.block_c - 1) == 0
            assert launch.block_hw & (launch.block_hw - 1) == 0
            assert 1 <= launch.num_warps <= 16
            assert launch.slab % (C // G) == 0
            units = N * ceil_div(C, launch.slab)
            assert launch.programs(units) == units * launch.parts * (2 if launch.split else 1)
            if launch.tier in ("A", "B"):
                assert launch.slab <= launch.block_c
                assert launch.block_hw >= HW or launch.tier == "B"
            else:
                assert (
                    launch.parts <= launch.lag <= units * launch.parts
                )  # or somebody waits for ever
                assert (launch.splits - 1) * launch.chunk < HW <= launch.splits * launch.chunk
                # Several groups fold within a program, which then has all their channels.
                assert launch.slab == C // G or launch.block_c >= launch.slab
            elements = launch.block_c * launch.block_hw
            assert elements <= (tiers.RESIDENT_ELEMENTS[direction] if launch.tier == "A" else 4096)
            # The corner of a tile is an int64; the offsets within it must fit in 32 bits.
            stride_c, stride_hw = (1, C) if channels_last else (HW, 1)
            assert launch.block_c * stride_c + launch.block_hw * stride_hw < 2**31


@pytest.mark.parametrize(
    ("N", "C", "HW", "tier"),
    [
        (128, 256, 8 * 8, "A"),
        (128, 256, 32 * 32, "A"),
        (64, 256, 64 * 64, "B"),
        (1, 256, 64 * 64, "C"),
        (8, 256, 256 * 256, "C"),
        (1, 256, 2048 * 2048, "D"),
    ],
    ids=["8×8", "32×32", "64×64", "too few groups to fill the GPU", "256×256", "a group over L2"],
)
def test_tier_follows_from_the_bytes_of_a_group(N: int, C: int, HW: int, tier: str) -> None:
    assert planned("forward", N, C, HW).tier == tier


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_published_site_fills_the_gpu_and_nchw_is_read_once_from_memory(
    direction: Direction, channels_last: bool
) -> None:
    """In 16 bits on an H100. In NCHW none is in tier D, and what C reads twice stays in its L2; in
    channels-last D is for whatever does not fit there as a whole, and for nothing else.

    By activation bytes, launches of fewer than two programs a multiprocessor are rare: 2 % at batch
    8, 10 % at batch 1.
    """
    tensors = 1 if direction == "forward" else 2
    for N, most in ((1, 0.1), (8, 0.02), (64, 0.02)):
        everything = few = 0
        for C, HW, count in weighted_sites():
            launch = planned(direction, N, C, HW, channels_last=channels_last)
            units = N * ceil_div(C, launch.slab)
            everything += count * C * HW
            if units * launch.parts < 264:
                few += count * C * HW
            whole = N * C * HW * 2 * tensors
            assert launch.tier != "D" or (channels_last and whole > 0.6 * 50 * 2**20), (C, HW)
            if launch.tier == "C":
                # A part is read again after `lag` others, and half of the resident programs' sums.
                behind = launch.lag + tiers.SPLIT_TILES[direction, channels_last][2] * 132 // 2
                part = launch.chunk * min(launch.block_c, launch.slab) * 2 * tensors
                assert min(behind * part, whole) <= 0.6 * 50 * 2**20, (C, HW)
                assert not channels_last or whole <= 0.6 * 50 * 2**20, (C, HW)
        assert few <= most * everything, (N, few / everything)


def test_tier_c_is_refused_where_a_group_exceeds_l2() -> None:
    with pytest.raises(ValueError, match="take tier D"):
        planned("forward", 1, 256, 2048 * 2048, "C")


def test_splits_fill_the_device() -> None:
    launch = planned("forward", 1, 64, 512 * 512)
    assert 32 * launch.parts >= 264


@pytest.mark.parametrize("element_size", [2, 4], ids=["16 bit", "32 bit"])
def test_channels_last_slabs_are_whole_groups_and_whole_sectors(element_size: int) -> None:
    for channels_per_group in (2, 6, 10, 12, 30, 42, 48, 80):
        C = 32 * channels_per_group
        launch = planned("forward", 256, C, 64, "B", channels_last=True, element_size=element_size)
        assert launch.slab % channels_per_group == 0
        assert launch.slab * element_size >= min(128, C * element_size)
        assert launch.slab * element_size % 32 == 0


def test_a_large_channels_last_group_is_divided_into_rows_not_columns() -> None:
    """One group of all channels: a program of one channel would read 2 bytes of each sector."""
    launch = plan_launch("forward", Problem(1, 1024, 4096, 1, True, 2), H100)
    assert launch.tier == "C" and launch.slab == 1024
    assert launch.block_c * 2 >= 128


def test_resident_tier_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(ValueError, match="tier A holds 16384 elements a program"):
        planned("forward", 1, 64, 256 * 256, "A")


def test_prefer_refuses_an_unknown_tier() -> None:
    with pytest.raises(ValueError, match="tier is 'A', 'B', 'C', 'D' or None, not 'E'"):  # noqa: SIM117
        with prefer("triton", "E"):
            pass


def test_prefer_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'triton' or 'aten', not 'cuda'"), prefer("cuda"):
        pass


def test_prefer_triton_raises_where_it_cannot_run() -> None:
    pytest.importorskip("triton")
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    with prefer("triton"), pytest.raises(RuntimeError, match="x is float64"):
        group_norm_silu(x, 2)


def test_prefer_ends_with_its_block() -> None:
    pytest.importorskip("triton")
    x = torch.randn(1, 4, 4)
    with prefer("triton", "D"):
        assert dispatch.choose_backend(x)[0] == "triton"
        assert dispatch.launch_for("forward", x, 2).tier == "D"
    assert dispatch.choose_backend(x)[0] == "aten"
    assert dispatch.launch_for("forward", x, 2).tier == "A"


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "reason"),
    [
        ("meta", torch.float32, True, "run on CUDA devices, and x is on meta"),
        ("meta", torch.float64, True, "compute in fp32, and x is float64"),
        ("meta", torch.float32, False, "Triton is not installed"),
        ("cpu", torch.float32, True, "x is on the CPU"),
    ],
)
def test_fallback_has_a_reason(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    installed: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
    backend, why = dispatch.choose_backend(torch.empty(1, 4, 4, device=device, dtype=dtype))
    assert backend == "aten"
    assert reason in why


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 2**17, 2**14, 2**17, False, 4),
        Problem(1, 2**15, 2**16, 2**15, True, 2),
        Problem(1, 2**23, 256, 2**23, True, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_samples_beyond_32_bits_have_a_launch(direction: Direction, problem: Problem) -> None:
    """A program of whole units addresses them in int32; the others start from an int64."""
    launch = plan_launch(direction, problem, H100)
    apart = problem.C if problem.channels_last else launch.slab
    assert launch.split or apart * problem.HW < 2**31
    if problem.channels_last:
        with pytest.raises(ValueError, match="in 32 bits"):
            plan_launch(direction, problem, H100, "B")
