"""`cost`: what the kernels cost at given sites, known on a machine without a GPU.

Every norm of the selected blocks, forward, rewritten and backward: bytes and sectors counted in
Triton's interpreter, machine code from cross-compilation. Interpreted and compiled kernels exclude
each other within a process, so each kind has worker processes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from resblock_bench.bench import environment, exitcodes
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.grid import GROUPS, plan
from resblock_bench.bench.progress import task_progress
from resblock_bench.bench.workers import pool

if TYPE_CHECKING:
    from resblock_bench.bench.axes import Selection
    from resblock_bench.bench.norm_cost import Direction, KernelCode, Norm, Traffic
    from resblock_bench.bench.records import Cell
    from resblock_bench.kernels.tiers import Launch, Tier

DEFAULT: Selection = {
    "channels": (256,),
    "resolution": (8, 32, 64, 256),
    "dtype": ("bf16",),
    "layout": ("nchw", "nhwc"),
}
"""One site for each tier, in both layouts."""


@dataclass(frozen=True)
class Request:
    """What to cost: blocks, architectures (90 is 9.0), and a tier or else the rules' choice."""

    selection: Selection
    archs: Sequence[int]
    tier: Tier | None = None
    json: Path | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of one norm on one architecture."""

    norm: Norm
    direction: Direction
    arch: int
    launch: dict[str, Any]
    traffic: Traffic
    kernels: list[KernelCode]


def carry_out(request: Request, console: Console) -> int:
    """Cost everything asked for, show it, and write it as JSON if a path is given.

    Raises UsageError without Triton, for an unknown architecture and where the tier cannot hold any
    of the norms.
    """
    from resblock_bench.bench import cost_table

    _check(request)
    norms = norms_of(request.selection)
    costs, refused = gather(norms, request.archs, request.tier, console)
    if request.json is not None:
        _write(request.json, costs)
    console.print(cost_table.table(costs), width=min(console.width, cost_table.WIDTH))
    for line in cost_table.notes(costs, refused):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if request.json is not None:
        console.print(f"json: {request.json}", markup=False, highlight=False, soft_wrap=True)
    return exitcodes.OK


def tier_named(name: str) -> Tier:
    """The tier that a user names."""
    from resblock_bench.kernels.tiers import TIERS

    if name not in TIERS:
        raise unknown("tier", name, TIERS)
    return TIERS[name]


def _check(request: Request) -> None:
    from resblock_bench.bench.machine_code import ARCHITECTURES
    from resblock_bench.kernels.dispatch import triton_installed

    if not triton_installed():
        raise UsageError("cost interprets and compiles Triton kernels, and Triton is not installed")
    for arch in request.archs:
        if arch not in ARCHITECTURES:
            raise unknown("architecture", str(arch), map(str, ARCHITECTURES))
    if request.json is not None and not request.json.absolute().parent.is_dir():
        raise UsageError(f"{request.json.parent} is not a folder: make it, or name another file")


def norms_of(selection: Selection) -> list[Norm]:
    """Both norms of every selected block, each once, in order."""
    from resblock_bench.bench.workload import unsupported

    cells = [item.cell for item in plan([selection])]
    for reason in filter(None, map(unsupported, cells)):
        raise UsageError(f"{reason}: ask for layout=nchw")
    return list(dict.fromkeys(norm for cell in cells for norm in _norms(cell)))


def _norms(cell: Cell) -> Iterator[Norm]:
    """As the fused block runs them on a GPU: conv1's bias is in the add before the second norm."""
    from resblock_bench.bench.norm_cost import Norm

    factor = {"up": 2, "down": 0.5, "none": 1}[cell.updown]
    common: dict[str, Any] = {
        "batch": cell.batch,
        "groups": GROUPS,
        "dtype": cell.dtype,
        "layout": cell.layout,
    }
    yield Norm(
        channels=cell.channels,
        positions=cell.resolution**cell.dims,
        modulation="none",
        bias_folded=False,
        dropout=0.0,
        **common,
    )
    yield Norm(
        channels=cell.out_channels,
        positions=int(cell.resolution * factor) ** cell.dims,
        modulation=cell.conditioning,
        bias_folded=True,
        dropout=cell.dropout,
        **common,
    )


def gather(
    norms: Sequence[Norm], archs: Sequence[int], tier: Tier | None, console: Console
) -> tuple[list[Cost], list[str]]:
    """The costs in order, and why the others have none: the tier asked for cannot hold them."""
    from resblock_bench.bench import norm_cost

    wanted: list[tuple[Norm, Direction, int, Launch]] = []
    refused: list[str] = []
    for norm in norms:
        for direction in norm_cost.DIRECTIONS:
            if direction == "rewrite" and tier is not None:
                continue
            for arch in archs:
                try:
                    launch = norm_cost.launch_of(norm, direction, arch, tier)
                except ValueError as error:
                    refused.append(str(error))
                else:
                    wanted.append((norm, direction, arch, launch))

    if not wanted:
        raise UsageError(f"tier {tier} holds none of the {len(norms)} norms: {refused[0]}")
    traffic: dict[Any, Future[Any]] = {}
    codes: dict[Any, Future[Any]] = {}
    with ExitStack() as stack:
        workers = environment.usable_cpus()
        interpreting = stack.enter_context(pool(workers, interpret=True))
        compiling = stack.enter_context(pool(workers, interpret=False))
        for norm, direction, arch, launch in wanted:
            # Architectures mostly share a launch; its traffic is counted once.
            key = (norm, direction, launch._replace(reason=""))
            if key not in traffic:
                traffic[key] = interpreting.submit(norm_cost.count_traffic, *key)
            codes[norm, direction, arch] = compiling.submit(
                norm_cost.compile_code, norm, direction, launch, arch
            )
        _wait([*traffic.values(), *codes.values()], console)
    costs = [
        Cost(
            norm=norm,
            direction=direction,
            arch=arch,
            launch=launch._asdict(),
            traffic=traffic[norm, direction, launch._replace(reason="")].result(),
            kernels=codes[norm, direction, arch].result(),
        )
        for norm, direction, arch, launch in wanted
    ]
    return costs, refused


def _wait(futures: Sequence[Future[Any]], console: Console) -> None:
    """Until all are done; the first failure ends it."""
    with task_progress(console, "counting bytes and compiling", len(futures)) as advance:
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _write(path: Path, costs: list[Cost]) -> None:
    data = msgspec.json.format(msgspec.json.encode(costs), indent=1)
    try:
        path.write_bytes(data + b"\n")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): name another file"
        ) from None
