"""What a kernel of the operator is compiled to, as text; runs where kernels are compiled."""

from __future__ import annotations

import re
from typing import NamedTuple

from resblock_bench.bench import machine_code
from resblock_bench.bench.machine_code import Sass, parse_sass
from resblock_bench.bench.norm_cost import Direction, Norm, kernels_of
from resblock_bench.kernels.tiers import Launch


class Compiled(NamedTuple):
    """parameters: of those that PTX has, in order, the name, or None where it is a number."""

    ptx: str
    sass: Sass
    parameters: list[str | None]
    warps: int


class Access(NamedTuple):
    """A PTX instruction on global memory: its operation, and what it may address."""

    operation: str
    parameters: frozenset[str]


def compiled(norm: Norm, direction: Direction, launch: Launch, arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    ((item,),) = kernels_of(norm, direction, launch).values()
    source = machine_code.specialise(item.kernel, item.arguments)
    options = {k: v for k, v in item.arguments.items() if k not in item.kernel.arg_names}
    target = GPUTarget("cuda", arch, machine_code.WARP_SIZE)
    binary = triton.compile(source, target=target, options=options)
    return Compiled(
        ptx=binary.asm["ptx"],
        sass=parse_sass(machine_code._disassemble(binary.asm["cubin"])),
        parameters=[
            name if kind.startswith("*") else None
            for name, kind in source.signature.items()
            if kind != "constexpr"
        ],
        warps=int(binary.metadata.num_warps),
    )


_STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"\w+_param_(\d+)")


def accesses(code: Compiled) -> list[Access]:
    """Every access to global memory, in the order of the text.

    A pointer is a kernel parameter, or what is computed from it; what is loaded is none.
    """
    statements = []
    for line in code.ptx.splitlines():
        if match := _STATEMENT.fullmatch(line.partition("//")[0].strip()):
            statements.append((match[1], match[2]))
    pointers: dict[str, set[str]] = {}
    grown = True
    while grown:  # a loop's pointers come from its end, too
        grown = False
        for operation, operands in statements:
            target, *others = _REGISTER.findall(operands) or [""]
            found = {name for other in others for name in pointers.get(other, ())}
            if operation.startswith("ld.param"):
                number = int(_PARAMETER.findall(operands)[0])
                # What is behind those of the kernel is for Triton itself.
                found = set(filter(None, code.parameters[number : number + 1]))
            elif operation.startswith(("ld.", "st.", "atom.", "red.")):
                continue
            if not found <= pointers.setdefault(target, set()):
                pointers[target] |= found
                grown = True
    found_accesses = []
    for operation, operands in statements:
        if re.match(r"(ld|st|atom|red)\.global", operation):
            (address,) = re.findall(r"\[\s*(%\w+)", operands)
            found_accesses.append(Access(operation, frozenset(pointers[address])))
    return found_accesses
