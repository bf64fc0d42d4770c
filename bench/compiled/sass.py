"""What a compiler writes, read as text: ptxas's log, SASS and PTX.

SASS is the GPU's own instructions as nvdisasm lists them, PTX what ptxas makes them of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# The category of an instruction by its opcode, with what stands before the first modifier or, for
# the exceptions, with it. Instructions of the uniform datapath (U…) go with their namesakes.
_CATEGORIES = {
    "memory": "LDG STG LD ST LDGSTS ATOM ATOMG RED REDG UBLKCP UBLKRED UTMALDG UTMASTG",
    "shared": "LDS STS LDSM STSM ATOMS SHFL REDUX CREDUX",
    "local": "LDL STL",
    "mufu": "MUFU",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FHADD FSEL FSET FSETP FMNMX FMNMX3 FCHK",
    "fp16": "HADD2 HMUL2 HFMA2 HSET2 HSETP2 HMNMX2",
    "convert": "F2F F2FP F2I F2IP FRND I2F I2FP I2I PRMT HADD2.F32",
    "integer/logic": (
        "IADD IADD3 IMAD IABS IMNMX ISETP ISCADD IDP LEA LOP LOP3 PLOP3 SHF SHL SHR SEL SGXT BMSK "
        "BREV FLO POPC VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE VOTEU"
    ),
    "move": "MOV IMAD.MOV CS2R S2R S2UR CS2UR R2UR LDC LDCU P2R R2P",
    "control/sync": (
        "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV WARPSYNC BAR B2R R2B MEMBAR FENCE "
        "ERRBAR CCTL DEPBAR LDGDEPBAR SYNCS NANOSLEEP YIELD NOP"
    ),
}
_CATEGORY = {opcode: name for name, opcodes in _CATEGORIES.items() for opcode in opcodes.split()}

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.+?)\s*;")
_LABEL = re.compile(r"(\S+):\s*")
_REFERENCE = re.compile(r"`\(([^)]+)\)")
_OPCODE = re.compile(r"(?:@!?\w+\s+)?([A-Z][\w.]*)")
_PTX_BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\S+);")
_PTX_LOAD = re.compile(r"\bld\.global(?!\.cg)\S*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_WIDTH = re.compile(r"[US]?(8|16|64|128|256)")
# Control never goes on to what follows these.
_ENDS = re.compile(r"(EXIT|RET)\b.*|BRA\S* `\([^)]+\)")


class Usage(NamedTuple):
    """What a thread takes, as ptxas states it."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def parse_ptxas(log: str) -> Usage:
    """Read the log of `ptxas -v` on a module with one kernel."""
    entry = log.partition("Compiling entry function")[2]
    memory = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
    )
    registers = re.search(r"Used (\d+) registers", entry)
    if memory is None or registers is None:
        raise RuntimeError(f"ptxas stated no registers and spills, but: {log!r}")
    return Usage(int(registers[1]), int(memory[1]), int(memory[2]), int(memory[3]))


class Sass(NamedTuple):
    """A kernel's instructions in order, and for every label the index of what it stands before."""

    instructions: list[str]
    labels: dict[str, int]


def parse_sass(text: str) -> Sass:
    """Read nvdisasm's output, without the padding after the last instruction."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            instructions.append(match[1])
        elif match := _LABEL.fullmatch(line):
            labels[match[1]] = len(instructions)
    sass = Sass(instructions, labels)
    while instructions and instructions[-1] == "NOP":
        instructions.pop()
    # A branch to itself, which stops a thread that runs past the end.
    if instructions and _targets(sass, len(instructions) - 1) == [len(instructions) - 1]:
        instructions.pop()
    return sass


def parse_ptx(text: str) -> Sass:
    """Loads, branches and ends of PTX as if they were SASS: what finding main loops takes."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        code = line.partition("//")[0].strip()
        if match := _LABEL.fullmatch(code):
            labels[match[1]] = len(instructions)
            instructions.append("NOP")  # or two loops might seem to begin in one place
        elif match := _PTX_BRANCH.fullmatch(code):
            instructions.append(f"{'@P0 ' if match[1] else ''}BRA `({match[2]})")
        elif match := _PTX_LOAD.search(code):
            instructions.append(f"LDG.{int(match[1] or 1) * int(match[2])}")
        elif code == "ret;":
            instructions.append("EXIT")
    return Sass(instructions, labels)


def normalised(sass: Sass) -> str:
    """The instructions line by line, labels renamed in the order in which they appear."""
    referred = {name for line in sass.instructions for name in _REFERENCE.findall(line)}
    placed: dict[int, list[str]] = {}
    for name, index in sass.labels.items():
        if name in referred:
            placed.setdefault(index, []).append(name)
    names: dict[str, str] = {}

    def rename(name: str) -> str:
        if name not in sass.labels:
            return name  # a symbol
        return names.setdefault(name, f"L{len(names)}")

    lines = []
    for i, instruction in enumerate(sass.instructions):
        lines += [f"{rename(name)}:" for name in placed.get(i, [])]
        lines.append(_REFERENCE.sub(lambda match: f"`({rename(match[1])})", instruction))
    return "\n".join(lines)


def opcode(instruction: str) -> str:
    """The operation with its modifiers, such as LDG.E.128, without predicate and operands."""
    match = _OPCODE.match(instruction)
    assert match is not None, instruction
    return match[1]


def operation(instruction: str) -> str:
    """The operation without modifiers, such as LDG."""
    return opcode(instruction).partition(".")[0]


def loads(instructions: Iterable[str]) -> dict[int, int]:
    """Loads from global memory by width; asynchronous copies of a thread's count, TMA's do not."""
    return _accesses(instructions, ("LDG", "LDGSTS"))


def stores(instructions: Iterable[str]) -> dict[int, int]:
    """Stores to global memory by width."""
    return _accesses(instructions, ("STG",))


def _accesses(instructions: Iterable[str], operations: tuple[str, ...]) -> dict[int, int]:
    counts = Counter(width(line) for line in instructions if operation(line) in operations)
    return dict(sorted(counts.items(), reverse=True))


def width(instruction: str) -> int:
    """Bits that a load or store moves for a thread: 32 where no modifier says otherwise."""
    for modifier in opcode(instruction).split(".")[1:]:
        if match := _WIDTH.fullmatch(modifier):
            return int(match[1])
    return 32


def categories(instructions: Iterable[str]) -> dict[str, int]:
    """How many instructions there are of each kind, and in all; every kind is there."""
    counts = Counter(category(line) for line in instructions)
    found = {name: counts[name] for name in (*_CATEGORIES, "other")}
    return {**found, "total": sum(found.values())}


def category(instruction: str) -> str:
    """One of the kinds that `MachineCode.instructions` counts."""
    parts = opcode(instruction).split(".")
    names = [".".join(parts[:2]), parts[0]]
    names += [name.removeprefix("U") for name in names]
    return next((_CATEGORY[name] for name in names if name in _CATEGORY), "other")


def per_element(main: list[list[str]], elements: list[float]) -> dict[str, float]:
    """Instructions by category over the elements that one turn of each loop does, all summed."""
    total = dict.fromkeys(categories([]), 0.0)
    for loop, count in zip(main, elements, strict=True):
        for name, found in categories(loop).items():
            total[name] += found / count
    return total


def main_loops(sass: Sass, tile_bits: float) -> list[list[str]]:
    """The instructions of each loop over tiles, or all in one where there is no such loop.

    A loop counts if one turn loads `tile_bits`, a thread's part of a tile, and no loop within it
    does. Waiting for other programs is therefore none, nor is summing up what they left; a loop
    over whole problems is one where a tile is all of a problem. A kernel may have two: statistics,
    then output. Without such a loop, it is what every program executes (`common`).
    """
    bulk = []
    for loop in loops(sass):
        if loaded_bits(sass.instructions[loop.start : loop.stop]) >= tile_bits:
            bulk.append(loop)
    innermost = [
        a for a in bulk if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in bulk)
    ]
    return [sass.instructions[a.start : a.stop] for a in innermost] or [common(sass)]


def common(sass: Sass) -> list[str]:
    """The instructions up to where all but the last program end.

    That is a conditional EXIT behind an atomic: whoever was not last to count there is done, and
    the last goes on with what all of them left.
    """
    counted = False
    for i, line in enumerate(sass.instructions):
        counted |= operation(line) in ("ATOM", "ATOMG")
        if counted and line.startswith("@") and operation(line) == "EXIT":
            return sass.instructions[: i + 1]
    return sass.instructions


def tiles_per_turn(main: list[list[str]], written: list[list[str]]) -> list[int]:
    """How many tiles one turn of each loop does, of which `written` are the same loops in PTX.

    Triton and LLVM leave them one tile a turn, and ptxas may unroll them, so it is what a loop
    loads over what it was written to load. Where there are not as many loops, 1 is taken.
    """
    if len(main) != len(written):
        return [1] * len(main)
    pairs = [(loaded_bits(a), loaded_bits(b)) for a, b in zip(main, written, strict=True)]
    return [max(1, round(a / b)) if b else 1 for a, b in pairs]


def loaded_bits(instructions: Iterable[str]) -> int:
    """What a thread loads from global memory when it executes each once.

    Without loads that go past L1 (ld.global.cg): they fetch what other programs have left.
    """
    own = (line for line in instructions if ".STRONG" not in line)
    return sum(bits * count for bits, count in loads(own).items())


def loops(sass: Sass) -> list[range]:
    """From its first instruction to its last branch back, every loop.

    A branch back closes a loop if the way to it always leads past its target. Rare code that stands
    behind the end of a kernel branches back, too, but is entered from elsewhere.
    """
    last: dict[int, int] = {}
    reached = _reachable(sass, None)
    for i in sorted(reached):
        for target in _targets(sass, i):
            if target <= i and i not in _reachable(sass, target):
                last[target] = i
    return [range(first, end + 1) for first, end in sorted(last.items())]


def _reachable(sass: Sass, without: int | None) -> set[int]:
    """The instructions that a thread may come to, from the first on, not going past `without`."""
    found: set[int] = set()
    ahead = [0]
    while ahead:
        i = ahead.pop()
        if i in found or i == without or i >= len(sass.instructions):
            continue
        found.add(i)
        ahead += _targets(sass, i)
        if not _ENDS.fullmatch(sass.instructions[i]):
            ahead.append(i + 1)
    return found


def _targets(sass: Sass, i: int) -> list[int]:
    """Where instruction i may jump to. A call may be one: ptxas leaves loops by them on 8.0."""
    instruction = sass.instructions[i]
    if operation(instruction) not in ("BRA", "CALL"):
        return []
    names = _REFERENCE.findall(instruction)
    return [sass.labels[name] for name in names if name in sass.labels]
