"""What a Triton kernel becomes on a GPU that is not there: registers, spills, accesses, occupancy.

A kernel is compiled as one of its launches would compile it, for an NVIDIA architecture named by
its compute capability (90 is 9.0). Triton, ptxas and nvdisasm come in Triton's wheel and need
neither a GPU nor a driver. What is counted is read from SASS, the GPU's own instructions. Nothing
is executed, so nothing here is a time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from resblock_bench.bench.errors import unknown

from .sass import (
    loads,
    main_loops,
    normalised,
    parse_ptx,
    parse_ptxas,
    parse_sass,
    per_element,
    stores,
    tiles_per_turn,
)

if TYPE_CHECKING:
    from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)

WARP_SIZE = 32
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": the same on
# 8.0, 9.0 and 10.0 but for the shared memory.
SM_WARPS = 64
SM_BLOCKS = 32
SM_REGISTERS = 65536
SM_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# Of those, the driver takes this much for every block.
RESERVED_SHARED_BYTES = 1024
# How they are handed out: cuda_occupancy.h of the CUDA toolkit, the occupancy calculator's source.
# A quarter of an SM has a quarter of its registers, and a warp's are all in one quarter.
SM_QUARTERS = 4
REGISTER_UNIT = 256
SHARED_UNIT_BYTES = 128

# Triton's name of a tensor's elements.
_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "u1",
}

# What Triton adds to ptxas's flags depends on its version: the last of these is the older.
_PTXAS_FLAGS = (("--regAllocOptLevel=2",), ())


class MachineCode(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel on one architecture.

    warps: of a program. registers: of a thread. stack_bytes, spill_store_bytes, spill_load_bytes:
    a thread's, as ptxas states them; the spills are what its spilling instructions move.
    occupancy: resident warps over what an SM can hold, in theory; occupancy_limit says what stops
    more: "registers", "shared memory", "warps" or "blocks".

    loads, stores: how many instructions of the whole kernel access global memory, by the bits
    that one of them moves for a thread; main_loads, main_stores: those in the main loops
    (`main_loops`). Each is counted once, however often it runs; in a loop that ptxas unrolled,
    as it does with short ones, it is there once for every tile of a turn.

    instructions: by category, what the main loops hold over the elements that a thread does in a
    turn, so what it executes for an element in all passes over it; "total" is their sum. loops:
    the same of each main loop by itself, in their order in the code. The tiles
    of a turn are taken into account (`tiles_per_turn`). A predicated instruction counts whether or
    not it takes effect, one on the uniform datapath as any other. "shared" includes warp shuffles,
    "local" is the stack, "convert" includes unpacking 16 bits with HADD2.F32 or PRMT, but bf16 is
    unpacked by shifts, in "integer/logic"; "fp16" is mostly constants, which ptxas loads with
    HFMA2. On 10.0 one fp32 instruction may do two elements.

    sass_hash: 16 hexadecimal digits over the instructions alone (`normalised`).
    """

    arch: int
    warps: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    occupancy: float
    occupancy_limit: str
    loads: dict[int, int]
    stores: dict[int, int]
    main_loads: dict[int, int]
    main_stores: dict[int, int]
    instructions: dict[str, float]
    loops: list[dict[str, float]]
    sass_hash: str


class KernelCode(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel of a call: how often it is launched, its programs in all, and its code."""

    kernel: str
    launches: int
    programs: int
    code: MachineCode


def compile_for(kernel: Any, arguments: Mapping[str, object], arch: int) -> MachineCode:
    """What `kernel[grid](**arguments)` would run on a GPU of that architecture.

    `arguments` includes launch options such as num_warps; tensors may be on any device, "meta"
    included. Multiply-adds are fused, whatever the installed Triton's default is. Raises
    RuntimeError for a kernel that is interpreted, for an architecture that the installed ptxas does
    not know, and where ptxas does not give Triton's binary.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if arch not in ARCHITECTURES:
        raise unknown("architecture", str(arch), map(str, ARCHITECTURES))
    if not ptxas_knows(arch):
        raise RuntimeError(
            f"the ptxas of Triton {triton.__version__} compiles nothing for sm_{arch} "
            f"({_ptxas(arch)}): take a newer Triton, or other architectures."
        )
    source = specialise(kernel, arguments)
    target = GPUTarget("cuda", arch, WARP_SIZE)
    options = {k: v for k, v in arguments.items() if k not in kernel.arg_names}
    _check_options(options, target)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    log = _ptxas_log(compiled.asm["ptx"], compiled.asm["cubin"], arch)
    sass = parse_sass(_disassemble(compiled.asm["cubin"]))

    warps, shared_bytes = int(compiled.metadata.num_warps), int(compiled.metadata.shared)
    usage = parse_ptxas(log)
    resident, limit = occupancy(arch, warps, usage.registers, shared_bytes)
    elements = tile_elements(kernel, arguments) / (WARP_SIZE * warps)
    tile_bits = elements * narrowest_bits(arguments)
    main = main_loops(sass, tile_bits)
    turns = tiles_per_turn(main, main_loops(parse_ptx(compiled.asm["ptx"]), tile_bits))
    counts = [tiles * elements for tiles in turns]
    flat = [line for loop in main for line in loop]
    return MachineCode(
        arch=arch,
        warps=warps,
        **usage._asdict(),
        shared_bytes=shared_bytes,
        occupancy=resident,
        occupancy_limit=limit,
        loads=loads(sass.instructions),
        stores=stores(sass.instructions),
        main_loads=loads(flat),
        main_stores=stores(flat),
        instructions=per_element(main, counts),
        loops=[per_element([loop], [count]) for loop, count in zip(main, counts, strict=True)],
        sass_hash=hashlib.sha256(normalised(sass).encode()).hexdigest()[:16],
    )


def specialise(kernel: Any, arguments: Mapping[str, object]) -> ASTSource:
    """Signature, constants and divisibility as Triton's own launch would specialise `arguments`.

    Constexpr parameters and None are constants, and so is an int that equals 1. An int or a
    pointer that is a multiple of 16 is marked divisible. An int is i32, i64 or u64 by its value, a
    float fp32, a bool u1, and floats and bools are never specialised. A parameter in
    `do_not_specialize` keeps its type alone, one in `do_not_specialize_on_alignment` is not marked
    divisible, an annotated one has the annotated type and is not made a constant.

    A tensor counts as aligned if its offset into its storage is. Launch options are left out.
    Raises TypeError where an argument is missing, as the launch does.
    """
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        name = getattr(kernel, "__name__", type(kernel).__name__)
        if isinstance(getattr(kernel, "fn", None), JITFunction):  # autotuned, or with heuristics
            raise RuntimeError(
                f"a {type(kernel).__name__} cannot be compiled, since it chooses what it launches: "
                "pass its kernel.fn, with one configuration among the arguments."
            )
        raise RuntimeError(
            f"{name} cannot be compiled: it was defined with TRITON_INTERPRET=1 in the "
            "environment; define it in a process that has it unset."
        )
    signature: dict[str, str] = {}
    constants: dict[int, object] = {}
    divisible: list[int] = []
    for i, (param, value) in enumerate(zip(kernel.params, _bind(kernel, arguments), strict=True)):
        kind, by_16 = _specialise_one(param, value)
        signature[param.name] = kind
        if kind == "constexpr":
            constants[i] = value
        if by_16:
            divisible.append(i)
    if "constexprs" in inspect.signature(ASTSource).parameters:
        attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
        return ASTSource(kernel, signature, {(i,): v for i, v in constants.items()}, attributes)
    return _source_3_2(kernel, signature, constants, divisible)


def _bind(kernel: Any, arguments: Mapping[str, object]) -> list[Any]:
    """The value of every parameter, in order."""
    passed = {k: v for k, v in arguments.items() if k in kernel.arg_names}
    bound = kernel.signature.bind(**passed)
    bound.apply_defaults()
    return list(bound.arguments.values())


def _specialise_one(param: Any, value: object) -> tuple[str, bool]:
    """The type of one argument, and whether it is marked as divisible by 16."""
    if param.is_constexpr or value is None:
        return "constexpr", False
    aligned = False
    if isinstance(value, torch.Tensor) and value.dtype in _DTYPES:
        kind = ("*k" if param.is_const else "*") + _DTYPES[value.dtype]
        aligned = value.storage_offset() * value.element_size() % 16 == 0
    elif isinstance(value, bool):
        kind = "u1"
    elif isinstance(value, int):
        aligned = value % 16 == 0
        narrow = -(2**31) <= value < 2**31
        kind = "i32" if narrow else "u64" if value >= 2**63 else "i64"
        if value == 1 and not param.do_not_specialize and not param.annotation_type:
            return "constexpr", False
    elif isinstance(value, float):
        kind = "fp32"
    else:
        received = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{param.name} of a kernel cannot be compiled for a {received}.")
    kind = param.annotation_type or kind
    if param.do_not_specialize or param.do_not_specialize_on_alignment:
        aligned = False
    return kind, aligned and not kind.startswith(("fp", "bf", "u1"))


def _source_3_2(
    kernel: Any, signature: dict[str, str], constants: dict[int, object], divisible: list[int]
) -> ASTSource:
    """The same for Triton 3.2, whose sources list constants by name and attributes by kind."""
    from triton.backends.compiler import AttrsDescriptor
    from triton.compiler import ASTSource

    ones = [i for i, v in constants.items() if v == 1 and not kernel.params[i].is_constexpr]
    kinds = {}
    for i, (name, kind) in enumerate(signature.items()):
        if not kernel.params[i].is_constexpr:
            # A null pointer is a constant there, and has a type nevertheless; so has a 1.
            kinds[name] = kind if i not in constants else "i32" if i in ones else "*i8"
    names = {kernel.arg_names[i]: v for i, v in constants.items()}
    attributes = AttrsDescriptor.from_dict(
        {
            "arg_properties": {"tt.divisibility": divisible, "tt.equal_to": ones},
            "cls": "AttrsDescriptor",
        }
    )
    return ASTSource(kernel, kinds, names, attributes)


def _check_options(options: Mapping[str, object], target: Any) -> None:
    """Raise KeyError for what is neither a parameter nor an option, as a launch does."""
    from triton.compiler import make_backend

    known = vars(make_backend(target).parse_options({}))
    for name in options:
        if name not in known:
            raise KeyError(f"{name} is neither a parameter of the kernel nor a launch option.")


def tile_elements(kernel: Any, arguments: Mapping[str, object]) -> int:
    """Elements of a program's tile: BLOCK_C·BLOCK_HW, or without both of them all BLOCK…."""
    values = dict(zip(kernel.arg_names, _bind(kernel, arguments), strict=True))
    names = ["BLOCK_C", "BLOCK_HW"]
    if not values.keys() >= set(names):
        names = [name for name in values if name.startswith("BLOCK")]
    if not names:
        raise ValueError(f"{kernel.__name__} has no tile: no parameter of it is called BLOCK….")
    return math.prod(int(values[name]) for name in names)


def narrowest_bits(arguments: Mapping[str, object]) -> int:
    """Bits of an element of the tensor with the smallest elements; 8 without tensors."""
    sizes = [v.element_size() for v in arguments.values() if isinstance(v, torch.Tensor)]
    return 8 * min(sizes, default=1)


# Problems of other sizes often share a kernel, and both programs take longer than it takes to look.
@functools.lru_cache(maxsize=256)
def _ptxas_log(ptx: str, cubin: bytes, arch: int) -> str:
    """What `ptxas -v` says of the PTX; Triton throws its own log away.

    That it is the same assembly is certain, since its instructions must be those of Triton's
    binary. The bytes may differ: the line table holds when the kernel's source was last written.
    """
    gpu = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert gpu is not None
    ptxas = _ptxas(arch)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        for flags in _PTXAS_FLAGS:
            command = [ptxas, "-lineinfo", "-v", *flags, f"--gpu-name={gpu[1]}"]
            done = subprocess.run(
                [*command, source, "-o", binary], capture_output=True, text=True, check=False
            )
            if done.returncode == 0 and _code(binary.read_bytes()) == _code(cubin):
                return done.stderr
    raise RuntimeError(
        f"{ptxas} did not give the binary that Triton made, so what it says of registers and "
        "spills may not hold; unset PTXAS_OPTIONS, DISABLE_PTXAS_OPT and TRITON_DISABLE_LINE_INFO, "
        "or take a Triton from 3.2 to 3.9."
    )


def _ptxas(arch: int) -> Path:
    """The ptxas that the installed Triton takes for an architecture.

    It is asked, since that changes: 3.4 has one for all, 3.6 another for 10.0, which in 3.9 serves
    9.0 as well.
    """
    from triton.backends.nvidia import compiler

    if not hasattr(compiler, "get_ptxas"):  # before 3.4
        return Path(compiler._path_to_binary("ptxas")[0])
    by_arch = inspect.signature(compiler.get_ptxas).parameters
    return Path(compiler.get_ptxas(*[arch] if by_arch else []).path)


@functools.cache
def ptxas_knows(arch: int) -> bool:
    """Whether the installed Triton can compile for an architecture: its ptxas lists it."""
    done = subprocess.run([_ptxas(arch), "--help"], capture_output=True, text=True, check=True)
    return re.search(rf"\bsm_{arch}\b", done.stdout) is not None


def _code(cubin: bytes) -> list[bytes]:
    """The sections of an ELF file that hold instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    code = []
    for i in range(count):
        _, _, flags, _, start, length = struct.unpack_from("<IIQQQQ", cubin, table + i * size)
        if flags & 0x4:  # SHF_EXECINSTR
            code.append(cubin[start : start + length])
    return code


@functools.lru_cache(maxsize=256)
def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        done = subprocess.run(
            [_nvdisasm(), "-c", binary], capture_output=True, text=True, check=True
        )
        return done.stdout


def _nvdisasm() -> Path:
    """Where Triton itself looks for it."""
    import triton

    override = os.environ.get("TRITON_NVDISASM_PATH")
    if override and Path(override).is_file():
        return Path(override)
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int) -> tuple[float, str]:
    """Resident warps over the most an SM holds, and what stops more; 0 where no block fits.

    Of two limits that are equal the first named is what cannot be changed: warps, then blocks.
    """
    warp_registers = _round_up(registers * WARP_SIZE, REGISTER_UNIT)
    resident = SM_QUARTERS * (SM_REGISTERS // SM_QUARTERS // warp_registers)
    block_bytes = _round_up(shared_bytes + RESERVED_SHARED_BYTES, SHARED_UNIT_BYTES)
    limits = {
        "warps": SM_WARPS // warps,
        "blocks": SM_BLOCKS,
        "registers": resident // warps,
        "shared memory": SM_SHARED_BYTES[arch] // block_bytes,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit] * warps / SM_WARPS, limit


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
