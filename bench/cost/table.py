"""The costs as a table of at most 100 columns: a section for each norm, a line for each kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from resblock_bench.bench.compiled.machine_code import MachineCode
from resblock_bench.bench.compiled.norms import KernelCode, Norm

from .costs import Cost

WIDTH = 100
T = TypeVar("T")
_MODULATION = {"none": "", "scale_shift": ", scale and shift", "add": ", pre-norm add"}


def table(costs: Sequence[Cost]) -> Table:
    """Passes and sectors of each direction; registers, spills, … of its kernels.

    Numbers of several architectures are separated by "/", in the order of the heading, and stand
    once where they are equal.
    """
    archs = "/".join(str(arch) for arch in dict.fromkeys(cost.arch for cost in costs))
    view = Table(
        title=f"cost on sm_{archs}", title_justify="left", expand=False, pad_edge=False, width=None
    )
    view.add_column("norm, direction, kernel", max_width=34, overflow="fold")
    for heading in ("passes", "sectors", "registers", "spill B", "occup.", "bits", "instr."):
        view.add_column(heading, justify="right", no_wrap=True)
    for norm, members in groupby(costs, key=lambda cost: cost.norm):
        view.add_section()
        view.add_row(Text(name_of(norm), style="bold"))
        for _, same in groupby(members, key=lambda cost: cost.direction):
            for line in _direction(list(same)):
                view.add_row(*line)
    return view


def name_of(norm: Norm) -> str:
    """Sizes, dtype and layout, and what modulates it."""
    return (
        f"{norm.batch}×{norm.channels}×{norm.positions} {norm.dtype} {norm.layout}"
        f"{_MODULATION[norm.modulation]}{', dropout' if norm.dropout else ''}"
    )


def _direction(costs: list[Cost]) -> list[list[str]]:
    first = costs[0]
    tiers = _each(costs, lambda cost: cost.launch["tier"])
    tier = "" if first.direction == "rewrite" else f", tier {tiers}"
    lines = [
        [
            f" {first.direction}{tier}",
            _each(costs, lambda cost: f"{cost.traffic.dram + cost.traffic.small:.2f}"),
            _each(costs, lambda cost: f"{cost.traffic.sector_efficiency:.0%}"),
        ]
    ]
    # Another launch on another architecture may have other kernels.
    names = dict.fromkeys(kernel.kernel for cost in costs for kernel in cost.kernels)
    for name in names:
        kernels = [kernel for cost in costs for kernel in cost.kernels if kernel.kernel == name]
        lines.append([f"   {name}", "", "", *_kernel(kernels)])
    return lines


def _kernel(kernels: list[KernelCode]) -> list[str]:
    codes = [kernel.code for kernel in kernels]
    return [
        _each(codes, lambda code: str(code.registers)),
        _each(codes, lambda code: str(code.spill_store_bytes + code.spill_load_bytes)),
        _each(codes, lambda code: f"{code.occupancy:.0%}"),
        _each(codes, _widths),
        _each(codes, lambda code: f"{code.instructions['total']:.0f}"),
    ]


def _widths(code: MachineCode) -> str:
    """The widest access of the main loops: that to the activation."""
    load, store = max(code.main_loads, default=0), max(code.main_stores, default=0)
    return str(load) if load == store or not store else f"{load},{store}"


def _each(items: Sequence[T], text: Callable[[T], str]) -> str:
    """The text of every item, or the one they share."""
    texts = [text(item) for item in items]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def notes(costs: Sequence[Cost], refused: Sequence[str]) -> list[str]:
    """What the columns mean, and what the numbers come to over the whole selection."""
    spilling = sum(kernel.code.spill_store_bytes > 0 for cost in costs for kernel in cost.kernels)
    lines = [
        "passes: over the activation, from memory, modulation and partial sums included; floor 2 "
        "forward, 3 backward, 2 rewritten. What a tier reads twice is expected from L2 (JSON has "
        "both). sectors: bytes asked for over bytes of 32-byte sectors. bits: a thread's widest "
        "global access (load,store). instr.: instructions a thread executes for an element.",
    ]
    for direction, same in _by_direction(costs).items():
        passes = [cost.traffic.dram for cost in same]
        total = [cost.traffic.dram + cost.traffic.small for cost in same]
        efficiency = [cost.traffic.sector_efficiency for cost in same]
        lines.append(
            f"{direction}: {min(passes):.2f}–{max(passes):.2f} passes over activations "
            f"({min(total):.2f}–{max(total):.2f} with all else), floor {same[0].traffic.floor}; "
            f"sector efficiency from {min(efficiency):.0%}"
        )
    lines.append(f"{spilling} kernels spill registers")
    if refused:
        lines.append(f"{len(refused)} left out, the first since {refused[0]}")
    return lines


def _by_direction(costs: Sequence[Cost]) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {}
    for cost in costs:
        found.setdefault(cost.direction, []).append(cost)
    return found
