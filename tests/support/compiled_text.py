"""What a kernel of the operator is compiled to, as text; runs where kernels are compiled."""

from __future__ import annotations

import re
from typing import NamedTuple

from resblock_bench.bench.compiled import machine_code
from resblock_bench.bench.compiled.norms import Direction, Norm, kernels_of
from resblock_bench.bench.compiled.sass import Sass, parse_sass
from resblock_bench.kernels.tiers import Launch


class Compiled(NamedTuple):
    """parameters: of those that PTX has, in order, the name, or None where it is a number."""

    ptx: str
    sass: Sass
    parameters: list[str | None]
    warps: int


class Statement(NamedTuple):
    """One of PTX: its operation, what it may address in global memory, and what may follow it."""

    operation: str
    parameters: frozenset[str]
    next: tuple[int, ...]


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
            if kind != "constexpr" and item.arguments[name] is not None
        ],
        warps=int(binary.metadata.num_warps),
    )


_LABEL = re.compile(r"(\$\w+):")
_STATEMENT = re.compile(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*);")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"\w+_param_(\d+)")


def statements(code: Compiled) -> list[Statement]:
    """The kernel's PTX, as far as memory and control flow go.

    A pointer is a kernel parameter, or what is computed from it; what is loaded is none.
    """
    lines: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for text in code.ptx.partition("\n{")[2].splitlines():
        line = text.partition("//")[0].strip()
        if match := _LABEL.fullmatch(line):
            labels[match[1]] = len(lines)
        elif match := _STATEMENT.fullmatch(line):
            lines.append((match[1] or "", match[2], match[3]))
    pointers = _pointers(code, lines)
    found = []
    for i, (predicate, operation, operands) in enumerate(lines):
        parameters: frozenset[str] = frozenset()
        if re.match(r"(ld|st|atom|red)\.global", operation):
            (address,) = re.findall(r"\[\s*(%\w+)", operands)
            parameters = frozenset(pointers[address])
        following = [labels[operands]] if operation.startswith("bra") else []
        if predicate or not operation.startswith(("bra", "ret")):
            following.append(i + 1)
        found.append(Statement(operation, parameters, tuple(following)))
    return found


def _pointers(code: Compiled, lines: list[tuple[str, str, str]]) -> dict[str, set[str]]:
    """The parameters that each register may be computed from."""
    pointers: dict[str, set[str]] = {}
    grown = True
    while grown:  # a loop's pointers come from its end, too
        grown = False
        for _, operation, operands in lines:
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
    return pointers
