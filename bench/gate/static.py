"""The static part of `check`: bytes and machine code of the kernels, the same on every machine.

In a checkout of this project a subject is a norm at fixed sizes, or the residual addition; in
another repository it is a case that its packages offer (compiled/cases.py). Its entries are the
traffic of each direction and the machine code of each of its kernels on each architecture. What
costs more for certain is a regression: spills, narrower accesses, more bytes, wasted sectors,
shared memory that no block may have. Machine code that is otherwise different is a change: only a
timing run can tell what it means, and the same machine code, launched alike, needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from resblock_bench.bench.checkout import in_checkout
from resblock_bench.bench.compiled import cases as kernel_cases
from resblock_bench.bench.compiled.machine_code import (
    ARCHITECTURES,
    RESERVED_SHARED_BYTES,
    SM_SHARED_BYTES,
    MachineCode,
)
from resblock_bench.bench.cost.costs import COUNTING, calls_of
from resblock_bench.bench.findings.findings import Finding
from resblock_bench.bench.grid.grid import GROUPS
from resblock_bench.bench.machine import workers
from resblock_bench.bench.machine.answers import answers
from resblock_bench.bench.machine.workers import Job

from .pins import Criterion, Entries, Found, PinFile, PinnedPart, Value

if TYPE_CHECKING:
    from resblock_bench.bench.compiled.norms import Norm

NAME = "static"

_ROUNDING = 1e-4  # of five digits
_WIDTH = 0.05  # one scalar more beside eight wide accesses narrows none of them
CRITERIA = {
    "registers": Criterion("lower", hard=False),
    "spill_bytes": Criterion("lower"),
    "shared_bytes": Criterion("lower", hard=False),
    "load_bits": Criterion("higher", _WIDTH),
    "store_bits": Criterion("higher", _WIDTH),
    "instructions": Criterion("lower", hard=False),
    "occupancy": Criterion("higher", hard=False),
    "sass_hash": Criterion(None),
    "warps": Criterion(None),
    "programs": Criterion(None),
    "launches": Criterion("lower"),
    "requested": Criterion("lower", _ROUNDING),
    "dram": Criterion("lower", _ROUNDING),
    "small": Criterion("lower", _ROUNDING),
    "sector_efficiency": Criterion("higher", _ROUNDING),
}
"""Of the figures of an entry.

registers, occupancy    as in MachineCode
spill_bytes             stored and loaded by a thread
shared_bytes            of a block
load_bits, store_bits   the mean width of a thread's accesses to global memory in the main loops,
                        Σ b²/Σ b over the bits b of each; 0: none
instructions            of a thread in the main loops, an element
sass_hash               the same where the instructions are
warps, programs         of a program, and of a launch
launches                of the kernel in one call; of every kernel together they are what the
                        host has to start, and one kernel more is an entry without a pin
requested, dram, small  passes over the activation (`Traffic`); of another package's case
                        bytes an element (`CaseTraffic`)
sector_efficiency       bytes asked for over those of the sectors they lie in
"""


_SPEED = ("sass_hash", "warps", "programs", "launches")
OWN = metadata.EntryPoint(
    "static_cases", "resblock_bench.bench.compiled.residual_case:cases", kernel_cases.GROUP
)


class Item(NamedTuple):
    """One entry of one subject, and the job that measures it."""

    subject: str
    entry: str
    job: Job


def norms() -> list[Norm]:
    """The norms that are pinned: every tier, layout, direction and modulation, bf16 and fp32."""
    from resblock_bench.bench.compiled.norms import Norm

    def norm(
        N: int, C: int, HW: int, dtype: Any, layout: Any, modulation: Any, dropout: float = 0.0
    ) -> Norm:
        return Norm(
            batch=N,
            channels=C,
            positions=HW,
            groups=GROUPS,
            dtype=dtype,
            layout=layout,
            modulation=modulation,
            bias_folded=modulation != "none",
            dropout=dropout,
        )

    return [
        # A comment is the tier, forward and backward. The launches take few programs to count.
        norm(8, 256, 64, "bf16", "nchw", "none"),  # A
        norm(8, 256, 1024, "fp32", "nchw", "add", dropout=0.1),  # A
        norm(64, 256, 4096, "bf16", "nchw", "scale_shift"),  # B
        norm(8, 256, 65536, "bf16", "nchw", "scale_shift"),  # C, a group divided
        norm(8, 512, 64, "bf16", "nhwc", "scale_shift"),  # A
        norm(64, 512, 1024, "bf16", "nhwc", "scale_shift"),  # C, 8.0: B
        norm(8, 320, 256, "bf16", "nhwc", "scale_shift"),  # C, ten channels a group
        norm(8, 256, 1024, "fp32", "nhwc", "add"),  # C
        norm(1, 64, 2**24, "bf16", "nchw", "scale_shift"),  # D
        norm(1, 64, 2**24, "bf16", "nhwc", "scale_shift"),  # D
    ]


def norm_name(norm: Norm) -> str:
    """Such as 8x256x1024-bf16-nhwc-scale_shift: (N, C, HW), and how it is stored and modulated."""
    sizes = f"{norm.batch}x{norm.channels}x{norm.positions}"
    dropout = "-dropout" if norm.dropout else ""
    return f"{sizes}-{norm.dtype}-{norm.layout}-{norm.modulation}{dropout}"


def norm_items(norms: Iterable[Norm]) -> Iterator[Item]:
    """The entries of norms. Traffic is there once for architectures that launch alike."""
    calls, _ = calls_of(norms, ARCHITECTURES, None)
    for (norm, direction), same in groupby(calls, key=lambda call: (call.norm, call.direction)):
        subject = norm_name(norm)
        together = list(same)
        alike: dict[Job, str] = {}
        for call in together:
            alike[call.traffic()] = f"{alike.get(call.traffic(), '')} sm_{call.arch}"
        for job, archs in alike.items():
            yield Item(subject, f"{direction} traffic{archs if len(alike) > 1 else ''}", job)
        for call in together:
            for kernel in call.kernels():
                name = f"{direction} sm_{call.arch} {kernel}"
                yield Item(subject, name, call.compilation(kernel))


def case_items(
    points: Iterable[metadata.EntryPoint],
) -> tuple[list[Item], list[Finding]]:
    """The entries of the cases that packages offer, and what is wrong with those that offer none.

    Foreign modules are imported in a process of their own, which they may end.
    """
    items: dict[str, list[Item]] = {}
    wrong: list[Finding] = []
    offers = {point: kernel_cases.offer_job(point.value) for point in points}
    offered = dict(workers.run(offers.values(), 1))
    for point, job in offers.items():
        package = point.dist.name if point.dist else point.name
        try:
            archs_of = offered[job].get()
        except workers.JobFailed as error:
            why = f"{point.value} cannot be used ({_one_line(error)})"
            text = f"of the package {package}: {why}; mend or uninstall it"
            wrong.append(Finding(NAME, "invalid", point.name, None, text))
            continue
        for name, archs in archs_of.items():
            if name in items:
                text = f"of the package {package}: another case has this name; rename one"
                wrong.append(Finding(NAME, "invalid", name, None, text))
                continue
            codes = [
                Item(name, f"sm_{arch}", kernel_cases.code_job(point.value, name, arch))
                for arch in archs
            ]
            traffic = kernel_cases.traffic_job(point.value, name)
            items[name] = [Item(name, "traffic", traffic), *codes]
    return [item for same in items.values() for item in same], wrong


def measure_items(items: Iterable[Item], console: Console) -> Found:
    """Every item's figures; a finding for each that failed, and for one that could not run."""
    wanted = list(items)
    values = dict(answers((item.job for item in wanted), console, COUNTING))
    found = Found()
    for subject, entry, job in wanted:
        entries = found.subjects.setdefault(subject, {})
        value, error = values[job]
        if error is not None:
            doing = "interpreted" if job.interpret else "compiled"
            text = f"could not be {doing}: {_one_line(error)}; mend the kernel or its launch"
            found.findings.append(Finding(NAME, "invalid", subject, entry, text))
            continue
        if job.interpret:
            entries[entry] = _traffic(value)
            continue
        code = value.code
        entries[entry] = {**_code(code), "programs": value.programs, "launches": value.launches}
        most = SM_SHARED_BYTES[code.arch] - RESERVED_SHARED_BYTES
        if code.shared_bytes > most:
            text = (
                f"needs {code.shared_bytes:,} bytes of shared memory, and sm_{code.arch} has "
                f"{most:,} for a block: it cannot be launched, take smaller tiles or fewer stages"
            )
            found.findings.append(Finding(NAME, "regression", subject, entry, text))
    return found


def measure(console: Console) -> Found:
    """Of this project in its checkout, elsewhere what the installed packages offer."""
    if in_checkout(Path.cwd()):
        cases, wrong = case_items([OWN])
        items = [*norm_items(norms()), *cases]
    else:
        points = kernel_cases.registered()
        items, wrong = case_items(points)
        if not points:
            text = (
                f"no installed package offers kernels by an entry point of {kernel_cases.GROUP}: "
                "add one to your pyproject.toml and install it with 'pip install -e .'"
            )
            wrong.append(Finding(NAME, "invalid", NAME, None, text))
    found = measure_items(items, console)
    found.findings[:0] = wrong
    return found


def summary(pins: Mapping[str, PinFile], found: Found) -> str:
    """How many kernels have exactly the pinned machine code and launch, and so the same speed."""
    pinned = _codes({subject: pin.entries for subject, pin in pins.items()})
    here = _codes(found.subjects)
    names = pinned.keys() | here.keys()
    same = sum(pinned.get(name) == here.get(name) for name in names)
    rest = f"{len(names) - same} do not" if same < len(names) else "no timing run is needed"
    return f"{same} of {len(names)} kernels have exactly the pinned machine code and launch" + (
        f"; {rest}" if names else ""
    )


def _codes(subjects: Mapping[str, Entries]) -> dict[tuple[str, str], tuple[Value, ...]]:
    """What decides a kernel's speed, by subject and entry."""
    return {
        (subject, entry): tuple(figures.get(name) for name in _SPEED)
        for subject, entries in subjects.items()
        for entry, figures in entries.items()
        if "sass_hash" in figures
    }


def _code(code: MachineCode) -> dict[str, Value]:
    return {
        "registers": code.registers,
        "spill_bytes": code.spill_store_bytes + code.spill_load_bytes,
        "shared_bytes": code.shared_bytes,
        "load_bits": _width(code.main_loads),
        "store_bits": _width(code.main_stores),
        "instructions": _rounded(code.instructions["total"]),
        "occupancy": _rounded(code.occupancy),
        "sass_hash": code.sass_hash,
        "warps": code.warps,
    }


def _width(accesses: Mapping[int, int]) -> float:
    """Σ b²/Σ b over the bits b that each of the accesses moves; their counts by these bits."""
    moved = sum(bits * count for bits, count in accesses.items())
    weighted = sum(bits**2 * count for bits, count in accesses.items())
    return _rounded(weighted / moved) if moved else 0


def _traffic(value: Any) -> dict[str, Value]:
    names = ("requested", "dram", "small", "sector_efficiency")
    return {name: _rounded(getattr(value, name)) for name in names if hasattr(value, name)}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _one_line(error: Exception) -> str:
    """What an error says; a compiler's message has the source in between."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"


def _cannot() -> str | None:
    from resblock_bench.kernels.dispatch import triton_installed

    if triton_installed():
        return None
    return "it interprets and compiles Triton kernels, and Triton is not installed: install triton"


def _made_with() -> dict[str, str | None]:
    import triton

    return {"triton": triton.__version__}


PART = PinnedPart(
    name=NAME,
    cannot=_cannot,
    measure=measure,
    criteria=CRITERIA,
    made_with=_made_with,
    summary=summary,
)
