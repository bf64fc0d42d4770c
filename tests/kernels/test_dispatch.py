"""Choosing an implementation and a tier: a pure function of shapes, checked without a GPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from resblock_bench.kernels import dispatch, group_norm_silu, prefer
from resblock_bench.kernels.dispatch import ceil_div, plan_launch

NCHW, NHWC = torch.contiguous_format, torch.channels_last
SHAPES = Path(__file__).parents[1] / "data" / "resblock_shapes.csv"


def published_sites() -> list[tuple[int, int, int]]:
    """(C, HW, G) of every norm of every published block."""
    sites = set()
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            factor = {"up": 4, "down": 0.25, "none": 1}[row["updown"]]
            positions = int(row["h"]) * int(row["w"])
            sites.add((int(row["c_in"]), positions, 32))
            sites.add((int(row["c_out"]), int(positions * factor), 32))
    return sorted(sites)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_published_site_is_covered_exactly(
    direction: str, layout: torch.memory_format
) -> None:
    """Every channel and every position belongs to one program, and tiles stay in bounds."""
    for C, HW, G in published_sites():
        for N in (1, 64):
            launch = plan_launch(direction, N, C, HW, G, layout, 2, 132)
            assert launch.block_c & (launch.block_c - 1) == 0
            assert launch.block_hw & (launch.block_hw - 1) == 0
            assert 1 <= launch.num_warps <= 16
            if launch.tier == "D":
                assert launch.chunk % launch.block_hw == 0
                assert (launch.splits - 1) * launch.chunk < HW <= launch.splits * launch.chunk
            else:
                assert launch.slab % (C // G) == 0 and launch.slab <= launch.block_c
                assert launch.block_hw >= HW or launch.tier == "B"
            elements = launch.block_c * launch.block_hw
            limit = dispatch.RESIDENT_ELEMENTS[direction] if launch.tier == "A" else 4096
            assert elements <= limit
            # The corner of a tile is an int64; the offsets within it must fit in 32 bits.
            stride_c, stride_hw = (HW, 1) if layout == NCHW else (1, C)
            assert launch.block_c * stride_c + launch.block_hw * stride_hw < 2**31


@pytest.mark.parametrize(
    ("N", "C", "HW", "tier"),
    [
        (128, 256, 8 * 8, "A"),
        (128, 256, 32 * 32, "A"),
        (64, 256, 64 * 64, "B"),
        (1, 256, 64 * 64, "D"),
        (8, 256, 256 * 256, "D"),
    ],
    ids=["8×8", "32×32", "64×64", "too few groups to fill the GPU", "256×256"],
)
def test_tier_follows_from_the_bytes_of_a_group(N: int, C: int, HW: int, tier: str) -> None:
    assert plan_launch("forward", N, C, HW, 32, NCHW, 2, 132).tier == tier


def test_splits_fill_the_device() -> None:
    launch = plan_launch("forward", 1, 64, 512 * 512, 32, NCHW, 2, 132)
    programs = ceil_div(64, launch.block_c) * launch.splits
    assert programs >= 132


def test_channels_last_slabs_are_whole_groups_of_128_bytes() -> None:
    for channels_per_group in (2, 6, 10, 12, 30, 48, 80):
        C = 32 * channels_per_group
        launch = plan_launch("forward", 256, C, 64, 32, NHWC, 2, 132, "A" if C < 500 else "B")
        assert launch.slab % channels_per_group == 0
        assert launch.slab * 2 >= min(128, C * 2)


def test_resident_tier_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(ValueError, match="tier A holds 16384 elements a program"):
        plan_launch("forward", 1, 64, 256 * 256, 32, NCHW, 2, 132, "A")


def test_prefer_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'triton' or 'aten', not 'cuda'"), prefer("cuda"):
        pass


def test_prefer_triton_raises_where_it_cannot_run() -> None:
    pytest.importorskip("triton")
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    with prefer("triton"), pytest.raises(RuntimeError, match="x is float64"):
        group_norm_silu(x, 2)


def test_prefer_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    x = torch.randn(1, 4, 4)
    with prefer("triton"):
        assert dispatch.plan(x, 2).backend == "triton"
    assert dispatch.plan(x, 2).backend == "aten"


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
