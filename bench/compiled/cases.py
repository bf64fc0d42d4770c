"""Kernels of other packages, for `check --static` to watch.

An installed package offers them by the entry point group `resblock_bench.static`: each object is a
function without arguments that returns `KernelCase`s. It is called in processes of its own, where
kernels are interpreted and again where they are compiled, so it may define them by import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.machine.workers import Job
from resblock_bench.bench.offers import NAME, NAME_RULE

from . import traffic
from .machine_code import ARCHITECTURES, KernelCode, compile_for

GROUP = "resblock_bench.static"


@dataclass(frozen=True)
class KernelCase:
    """One launch of a Triton kernel, `kernel[grid](**arguments(device))`.

    name                that of its pin, by `offers.NAME_RULE`
    arguments(device)   tensors, scalars, constexprs and launch options by name. On "cpu" the launch
                        is run in Triton's interpreter, so the tensors should be small; on "meta" it
                        is compiled. Parameters BLOCK… are the sides of a program's tile.
    archs               architectures to compile for, such as 90 for Hopper
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: Callable[[str], Mapping[str, Any]]
    archs: tuple[int, ...] = ARCHITECTURES


class CaseTraffic(NamedTuple):
    """Global memory in bytes an element of the launch's largest tensor: asked for, and touched at
    least once; bytes asked for over those of the 32-byte sectors they lie in."""

    requested: float
    dram: float
    sector_efficiency: float


def registered() -> list[metadata.EntryPoint]:
    """What installed packages offer, in order of their names."""
    return sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def cases_of(value: str) -> dict[str, KernelCase]:
    """The cases of an entry point "module:function" by name.

    Raises InvalidError where it offers none, and whatever a foreign package raises.
    """
    function = metadata.EntryPoint("cases", value, GROUP).load()
    found = function() if callable(function) else None
    cases = list(found) if isinstance(found, Iterable) else []
    for case in cases:
        if not isinstance(case, KernelCase):
            raise InvalidError(f"it offers a {type(case).__name__}, not a KernelCase")
        if not isinstance(case.name, str) or not NAME.fullmatch(case.name):
            raise InvalidError(f"{case.name!r} is no name: use {NAME_RULE}")
    if not cases:
        raise InvalidError("it is no function that returns KernelCases")
    by_name = {case.name: case for case in cases}
    if len(by_name) < len(cases):
        raise InvalidError("two of its cases have the same name")
    return by_name


def offer_job(value: str) -> Job:
    """Lists what an entry point "module:function" offers: architectures by name."""
    return Job(False, offered, (value,))


def offered(value: str) -> dict[str, tuple[int, ...]]:
    """The architectures of each case by its name; raises what `cases_of` does."""
    return {name: tuple(case.archs) for name, case in cases_of(value).items()}


def traffic_job(value: str, name: str) -> Job:
    """Counts a case's bytes: a CaseTraffic."""
    return Job(True, count_case, (value, name))


def code_job(value: str, name: str, arch: int) -> Job:
    """Compiles a case: a KernelCode."""
    return Job(False, compile_case, (value, name, arch))


def count_case(value: str, name: str) -> CaseTraffic:
    """Needs TRITON_INTERPRET=1 when the kernel's module is imported."""
    case = cases_of(value)[name]
    arguments = case.arguments("cpu")
    with traffic.counting() as counter:
        case.kernel[case.grid](**arguments)
    accesses = counter.accesses()
    if not accesses:
        raise InvalidError(f"{name} moves no bytes: give it tensors to load from or store to")
    elements = max(v.numel() for v in arguments.values() if isinstance(v, torch.Tensor))
    requested = sum(access.requested_bytes for access in accesses)
    sectors = sum(access.sectors for access in accesses)
    return CaseTraffic(
        requested=requested / elements,
        dram=sum(access.distinct_bytes for access in accesses) / elements,
        sector_efficiency=requested / (sectors * traffic.SECTOR_BYTES),
    )


def compile_case(value: str, name: str, arch: int) -> KernelCode:
    """Must not have TRITON_INTERPRET=1 when the kernel's module is imported."""
    case = cases_of(value)[name]
    code = compile_for(case.kernel, case.arguments("meta"), arch)
    return KernelCode(kernel=name, launches=1, programs=math.prod(case.grid), code=code)
