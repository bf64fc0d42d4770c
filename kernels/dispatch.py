"""Which implementation, tier and launch a call takes: decided here and nowhere else.

A call runs in Triton on CUDA devices in fp32, fp16 and bf16, and in ATen everywhere else. Within
Triton the tier follows from the bytes of one group (docs/kernels.md): A keeps the group in
registers, B reads it twice with the second read in L2, D splits it over many programs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from resblock_bench.kernels.spec import memory_format

Backend = Literal["triton", "aten"]
Tier = Literal["A", "B", "D"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one register-resident tile, padding included: 64 KiB in fp32, 32 registers a thread
# at 512 threads. The backward keeps two such tiles, so it gets half.
RESIDENT_ELEMENTS = {"forward": 16384, "backward": 8192}
# Above this a group no longer has a fair share of L2 to be read from a second time.
TWO_READ_BYTES = 128 * 1024
STREAM_ELEMENTS = 4096
# Channels of a channels-last slab: 128 bytes of the narrowest type.
SLAB_CHANNELS = 64
# Programs that fill a GPU when there is none to ask (interpreter, cross-compilation): an H100's.
DEFAULT_SM_COUNT = 132

# Found out once, at import: torch.compile traces neither these look-ups nor a cache around them.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# A plain global, not a ContextVar: torch.compile cannot trace reading the latter.
_preferred: Backend | None = None


class Launch(NamedTuple):
    """One direction's launch. slab: channels of a program (tiers A and B: whole groups).
    splits, chunk: parts of HW and positions of a part (tier D)."""

    tier: Tier
    slab: int
    block_c: int
    block_hw: int
    splits: int
    chunk: int
    num_warps: int
    reason: str


class Plan(NamedTuple):
    """How one call runs. The launches are None in ATen, which decides for itself.

    rewrite: the launch that computes the output once more from saved statistics (tier D's apply).
    """

    backend: Backend
    memory_format: torch.memory_format
    forward: Launch | None
    backward: Launch | None
    rewrite: Launch | None
    reason: str


@contextmanager
def prefer(backend: Backend) -> Iterator[None]:
    """Within the block, all calls of the process take `backend`, or raise where it cannot run.

    "aten" measures or debugs without Triton. "triton" on CPU tensors runs the kernels in Triton's
    interpreter and needs TRITON_INTERPRET=1 in the environment before Python starts.
    """
    if backend not in ("triton", "aten"):
        raise ValueError(f"backend is 'triton' or 'aten', not {backend!r}.")
    global _preferred
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def plan(x: Tensor, num_groups: int, tier: Tier | None = None) -> Plan:
    """The plan of a call on x, whose arguments are valid; `tier` overrides the choice."""
    backend, reason = choose_backend(x)
    layout = memory_format(x)
    if backend == "aten" or x.numel() == 0:
        return Plan("aten", layout, None, None, None, reason if x.numel() else "x is empty")
    N, C = x.shape[:2]
    problem = (N, C, x[0, 0].numel(), num_groups, layout, x.element_size(), sm_count(x.device))
    return Plan(
        "triton",
        layout,
        plan_launch("forward", *problem, tier),
        plan_launch("backward", *problem, tier),
        plan_launch("forward", *problem, "D"),
        reason,
    )


def choose_backend(x: Tensor) -> tuple[Backend, str]:
    """Triton or ATen, and why."""
    obstacle = triton_obstacle(x)
    if _preferred == "aten":
        return "aten", "asked for with prefer('aten')"
    if _preferred == "triton":
        if obstacle is not None:
            raise RuntimeError(f"prefer('triton') was asked for, but {obstacle}.")
        return "triton", "asked for with prefer('triton')"
    if x.device.type == "cpu":
        return "aten", "x is on the CPU, where Triton only interprets"
    if obstacle is not None:
        return "aten", obstacle
    return "triton", f"{x.device.type} tensor in {str(x.dtype).removeprefix('torch.')}"


def triton_obstacle(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take x, or None."""
    if not triton_installed():
        return "Triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"the Triton kernels compute in fp32, and x is {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cpu" and not interpreting():
        return "x is on the CPU and TRITON_INTERPRET=1 is not set"
    if x.device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA devices, and x is on {x.device.type}"
    return None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """Whether kernels are interpreted: Triton reads the variable when it defines them."""
    return _INTERPRETING


@functools.cache
def sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_SM_COUNT
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=4096)
def plan_launch(
    direction: Literal["forward", "backward"],
    N: int,
    C: int,
    HW: int,
    G: int,
    layout: torch.memory_format,
    element_size: int,
    sms: int,
    tier: Tier | None = None,
) -> Launch:
    """The tier and the shape of one direction's launch; `tier` overrides the choice."""
    CG = C // G
    channels_last = layout != torch.contiguous_format
    slab = CG * min(G, ceil_div(SLAB_CHANNELS, CG)) if channels_last else CG
    block_c = power_of_2(slab)
    resident = RESIDENT_ELEMENTS[direction]
    tensors = 1 if direction == "forward" else 2
    group_bytes = tensors * CG * HW * element_size
    programs = N * ceil_div(C, slab)
    fits = block_c * power_of_2(HW) <= resident

    if tier is None:
        if fits:
            tier = "A"
        elif group_bytes <= TWO_READ_BYTES and programs >= sms and block_c <= STREAM_ELEMENTS:
            tier = "B"
        else:
            tier = "D"
    elif tier == "A" and not fits:
        raise ValueError(
            f"tier A holds {resident} elements a program, and {block_c} channels by "
            f"{power_of_2(HW)} positions are {block_c * power_of_2(HW)}; take tier B or D."
        )
    kib = f"{group_bytes / 1024:.4g} KiB a group"

    if tier == "A":
        block_hw = power_of_2(HW)
        warps = _warps(block_c * block_hw)
        why = f"{kib}, in registers: {block_c}×{block_hw} ≤ {resident} elements"
        return Launch("A", slab, block_c, block_hw, 1, HW, warps, why)
    if tier == "B":
        block_hw = max(1, min(power_of_2(HW), STREAM_ELEMENTS // block_c))
        warps = _warps(block_c * block_hw)
        why = f"{kib} ≤ {TWO_READ_BYTES // 1024} KiB and {programs} programs, second read from L2"
        return Launch("B", slab, block_c, block_hw, 1, HW, warps, why)
    if channels_last:
        block_c = min(power_of_2(C), SLAB_CHANNELS)
        block_hw = min(power_of_2(HW), STREAM_ELEMENTS // block_c)
    else:
        # One channel a program where a channel fills a tile: its γ' and β' are then scalars.
        block_hw = min(power_of_2(HW), STREAM_ELEMENTS)
        block_c = min(power_of_2(C), STREAM_ELEMENTS // block_hw)
    tiles = ceil_div(HW, block_hw)
    # About two waves of programs, as far as HW can be divided.
    wanted = max(1, min(64, tiles, 2 * sms // (N * ceil_div(C, block_c))))
    chunk = ceil_div(tiles, wanted) * block_hw
    splits = ceil_div(HW, chunk)
    why = f"{kib}, {programs} programs of whole groups: statistics and apply split {splits} ways"
    return Launch("D", block_c, block_c, block_hw, splits, chunk, _warps(block_c * block_hw), why)


def _warps(elements: int) -> int:
    """16 elements a thread, from 1 to 16 warps; more elements a thread beyond that."""
    return max(1, min(16, power_of_2(elements) // 512))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
