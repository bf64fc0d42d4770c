"""Small kernels whose machine code is known beforehand, compiled for GPUs that are not there.

Run as a script with the names of PARTS, prints JSON. A process of its own, since kernels that were
defined under TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from resblock_bench.bench.compiled import machine_code
from resblock_bench.bench.compiled.machine_code import (
    ARCHITECTURES,
    MachineCode,
    compile_for,
    ptxas_knows,
    specialise,
)

KNOWN = [arch for arch in ARCHITECTURES if ptxas_knows(arch)]
TARGET = GPUTarget("cuda", 90, 32)


@triton.jit
def copy_kernel(p_x, p_y, HW, BLOCK_HW: tl.constexpr):
    """Row by row, BLOCK_HW positions of each."""
    o_j = tl.arange(0, BLOCK_HW)
    o_row = tl.program_id(0) * HW
    m_row = o_j < HW
    tl.store(p_y + o_row + o_j, tl.load(p_x + o_row + o_j, mask=m_row), mask=m_row)


@triton.jit
def keep_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Every element is loaded before the first is stored."""
    o_i = tl.arange(0, BLOCK)
    x = tl.load(p_x + o_i)
    tl.store(p_y + o_i, x - tl.sum(x))


@triton.jit
def scale_kernel(p_x, p_y, HW, FACTOR: tl.constexpr, BLOCK_HW: tl.constexpr):
    """One loop: a load, a multiply-add and a store."""
    o_j = tl.arange(0, BLOCK_HW)
    for hw in range(0, HW, BLOCK_HW):
        x = tl.load(p_x + hw + o_j)
        tl.store(p_y + hw + o_j, x * FACTOR + 1.0)


@triton.jit
def twin_kernel(p_x, p_y, HW, FACTOR: tl.constexpr, BLOCK_HW: tl.constexpr):
    """The same under another name, from other lines."""
    o_j = tl.arange(0, BLOCK_HW)

    for hw in range(0, HW, BLOCK_HW):
        x = tl.load(p_x + hw + o_j)

        tl.store(p_y + hw + o_j, x * FACTOR + 1.0)


@triton.jit
def nested_kernel(p_x, p_y, p_table, N, K, HW, BLOCK_HW: tl.constexpr):
    """For every row a loop over a table and two over tiles, of which the second stores."""
    o_j = tl.arange(0, BLOCK_HW)
    for n in range(N):
        offset = 0.0
        for k in range(K):
            offset = tl.maximum(offset, tl.load(p_table + n * K + k))
        total = tl.zeros([BLOCK_HW], tl.float32)
        for hw in range(0, HW, BLOCK_HW):
            total += tl.load(p_x + n * HW + hw + o_j)
        mean = tl.sum(total) + offset
        for hw in range(0, HW, BLOCK_HW):
            tl.store(p_y + n * HW + hw + o_j, tl.load(p_x + n * HW + hw + o_j) - mean)


@triton.jit(do_not_specialize=["plain"], do_not_specialize_on_alignment=["unaligned"])
def argument_kernel(p_x, value, plain, unaligned, typed: tl.int64, DEFAULT: tl.constexpr = 3):
    pass


def tensor(dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Without storage; `offset` elements after an aligned address."""
    return torch.empty(4096, dtype=dtype, device="meta")[offset:]


HALF, SINGLE = tensor(torch.float16), tensor(torch.float32)
COPY = {"p_x": HALF, "p_y": HALF, "HW": 4096, "BLOCK_HW": 1024, "num_warps": 4}
SCALE = {"p_x": SINGLE, "p_y": SINGLE, "HW": 4096, "FACTOR": 2.5, "BLOCK_HW": 1024}


def accesses() -> dict[str, MachineCode]:
    nothing_fits = {"p_x": SINGLE, "p_y": SINGLE, "BLOCK": 16384, "num_warps": 1}
    return {
        "aligned": compile_for(copy_kernel, COPY, 90),
        # One of those of which ptxas makes something else where a flag of Triton's is missing.
        "odd rows": compile_for(copy_kernel, {**COPY, "HW": 4095}, KNOWN[-1]),
        "shifted": compile_for(copy_kernel, {**COPY, "p_x": tensor(torch.float16, 1)}, 90),
        "spilling": compile_for(keep_kernel, nothing_fits, 90),
    }


def loops() -> dict[str, MachineCode]:
    sizes = {"N": 3, "K": 5, "HW": 4096, "BLOCK_HW": 1024}
    nested = {"p_x": SINGLE, "p_y": SINGLE, "p_table": SINGLE, **sizes}
    found = {str(arch): compile_for(scale_kernel, SCALE, arch) for arch in KNOWN}
    return {**found, "nested": compile_for(nested_kernel, nested, 90)}


def hashes() -> dict[str, MachineCode]:
    found = {
        "first": compile_for(scale_kernel, SCALE, 90),
        "twin": compile_for(twin_kernel, SCALE, 90),
        "other constant": compile_for(scale_kernel, {**SCALE, "FACTOR": 1.5}, 90),
    }
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    return {**found, "again": compile_for(scale_kernel, SCALE, 90)}


def specialisations() -> list[dict[str, Any]]:
    """Arguments as this package and as Triton's own launch specialise them.

    Empty where Triton does not have the latter where 3.7 has it.
    """
    if not hasattr(triton.JITFunction, "_pack_args"):
        return []
    values = [None, True, False, 0, 1, 2, 8, 16, -16, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1]
    values += [2**40, 2**63, 1.0, 16.0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        values += [tensor(dtype, offset) for offset in (0, 1, 2, 4, 8, 16)]
    found = []
    for value in values:
        integer = value if type(value) is int else 7
        arguments = {"p_x": value, "value": value, "plain": value, "unaligned": value}
        arguments["typed"] = integer
        ours = specialise(argument_kernel, arguments)
        found.append(
            {
                "value": repr(value),
                "ours": describe(ours.signature, ours.constants, ours.attrs),
                "triton": describe(*triton_specialises(argument_kernel, arguments)),
            }
        )
    return found


def triton_specialises(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What `kernel[grid](**arguments)` does before it compiles."""
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    _, signature, constants, attributes = kernel._pack_args(
        backend, {}, bound, specialization, options
    )
    return signature, constants, attributes


def describe(signature: Any, constants: Any, attributes: Any) -> dict[str, Any]:
    return {
        "signature": signature,
        "constants": {str(k): repr(v) for k, v in constants.items()},
        "attributes": {str(k): v for k, v in attributes.items() if v},
    }


def errors() -> dict[str, str]:
    ones = {"p_x": None, "value": 1, "plain": 1, "unaligned": 1, "typed": 1}
    without = {k: v for k, v in COPY.items() if k != "HW"}
    made, another = (
        triton.compile(specialise(copy_kernel, {**COPY, "HW": HW}), target=TARGET).asm
        for HW in (4096, 4095)
    )
    # As if the source had another name: in the line table, and of no consequence.
    moved = made["cubin"].replace(Path(__file__).name.encode(), b"x" * len(Path(__file__).name))
    assert moved != made["cubin"]
    log = machine_code._ptxas_log

    def with_an_older_ptxas() -> None:
        knows, machine_code.ptxas_knows = machine_code.ptxas_knows, lambda arch: arch < 90
        try:
            compile_for(copy_kernel, COPY, 90)
        finally:
            machine_code.ptxas_knows = knows

    return {
        "ptxas": error_of(with_an_older_ptxas),
        "missing": error_of(lambda: specialise(copy_kernel, without)),
        "misspelled": error_of(lambda: compile_for(copy_kernel, {**COPY, "nun_warps": 8}, 90)),
        "text": error_of(lambda: specialise(copy_kernel, {**COPY, "HW": "4096"})),
        "architecture": error_of(lambda: compile_for(copy_kernel, COPY, 70)),
        "binary": error_of(lambda: log(made["ptx"], another["cubin"], 90)),
        "line table": error_of(lambda: log(made["ptx"], moved, 90)),
        "no tile": error_of(lambda: machine_code.tile_elements(argument_kernel, ones)),
    }


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


PARTS = {f.__name__: f for f in (accesses, loops, hashes, specialisations, errors)}

if __name__ == "__main__":
    found = {part: PARTS[part]() for part in sys.argv[1:]}
    print(msgspec.json.encode(found).decode())
