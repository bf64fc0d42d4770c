"""Kernel cases as another package would offer them: one good, the others each worse in one way."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import triton
import triton.language as tl

from resblock_bench.bench.plugins import KernelCase

ROWS, COLUMNS = 2, 8192
NUMBER = 7


@triton.jit
def row_kernel(
    p_x,
    p_y,
    stride,
    MORE: tl.constexpr,
    AGAIN: tl.constexpr,
    BROKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row less its sum. Every element is loaded before the first is stored."""
    tl.static_assert(not BROKEN, "broken on purpose")
    o_i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    x = tl.load(p_x + o_i)
    y = x - tl.sum(x)
    if MORE:
        y = tl.maximum(y, 1.0)
    if AGAIN:
        y += tl.load(p_x + o_i)
    tl.store(p_y + o_i, y)


@triton.jit
def pair_kernel(p_x, p_w, p_y, offset, BLOCK: tl.constexpr):
    """x·w, with w from `offset` on."""
    o_i = tl.arange(0, BLOCK)
    tl.store(p_y + o_i, tl.load(p_x + o_i) * tl.load(p_w + offset + o_i))


@triton.jit
def idle_kernel(n, BLOCK: tl.constexpr):
    """Computes for itself."""
    tl.device_assert(n < BLOCK)


@triton.jit
def product_kernel(p_x, p_y, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """x·xᵀ, with all of x in shared memory."""
    o_i, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    x = tl.load(p_x + o_i[:, None] * BLOCK_K + o_k)
    w = tl.load(p_x + o_i * BLOCK_K + o_k[:, None])
    tl.store(p_y + o_i[:, None] * BLOCK + o_i, tl.dot(x, w).to(tl.float16))


def row(
    name: str, *, pad: int = 0, crash: bool = False, rows: int = ROWS, **changes: Any
) -> KernelCase:
    def arguments(device: str) -> dict[str, Any]:
        if crash and device == "meta":
            os.kill(os.getpid(), signal.SIGSEGV)
        return {
            "p_x": torch.zeros(ROWS, COLUMNS + pad, device=device),
            "p_y": torch.zeros(ROWS, COLUMNS + pad, device=device),
            "stride": COLUMNS + pad,
            "MORE": False,
            "AGAIN": False,
            "BROKEN": False,
            "BLOCK": COLUMNS,
            "num_warps": 8,
            **changes,
        }

    return KernelCase(name, row_kernel, (rows,), arguments, archs=(90,))


def product(name: str) -> KernelCase:
    def arguments(device: str) -> dict[str, Any]:
        x = torch.zeros(128, 512, dtype=torch.float16, device=device)
        y = torch.zeros(128, 128, dtype=torch.float16, device=device)
        return {"p_x": x, "p_y": y, "BLOCK": 128, "BLOCK_K": 512, "num_warps": 8}

    return KernelCase(name, product_kernel, (1,), arguments, archs=(90,))


def pair(name: str, offset: int = 0) -> KernelCase:
    def arguments(device: str) -> dict[str, Any]:
        x, y = (torch.zeros(1024, device=device) for _ in range(2))
        w = torch.zeros(1024 + offset, device=device)
        return {"p_x": x, "p_w": w, "p_y": y, "offset": offset, "BLOCK": 1024, "num_warps": 4}

    return KernelCase(name, pair_kernel, (1,), arguments, archs=(90,))


def autotuned(name: str) -> KernelCase:
    kernel = triton.autotune([triton.Config({"BLOCK": 1024})], key=[])(pair_kernel)
    arguments = pair("").arguments
    return KernelCase(name, kernel, (1,), arguments, archs=(90,))


def idle(name: str) -> KernelCase:
    return KernelCase(name, idle_kernel, (1,), lambda device: {"n": 1, "BLOCK": 1024}, archs=(90,))


def cases() -> list[KernelCase]:
    return [
        row("good"),
        row("same"),
        row("crashing", crash=True),
        row("broken", BROKEN=True),
        row("narrow", pad=1),
        row("spilling", num_warps=1),
        row("reading-twice", AGAIN=True),
        row("longer", MORE=True),
        row("once", rows=1),
        product("much-shared"),
        pair("pair"),
        pair("pair-narrow", offset=1),
        autotuned("autotuned"),
        idle("idle"),
    ]


def numbers() -> list[int]:
    return [NUMBER]


def unnameable() -> list[KernelCase]:
    return [row("no/name")]


def twins() -> list[KernelCase]:
    return [row("twin"), row("twin")]
