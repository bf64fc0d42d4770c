"""`cost`: what the kernels cost at given sites, known on a machine without a GPU.

Every norm of the selected blocks, forward, rewritten and backward: bytes and sectors counted in
Triton's interpreter, machine code from cross-compilation, and a time predicted from both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.machine import workers
from resblock_bench.bench.machine.workers import Job
from resblock_bench.bench.terminal import say

from .costs import Cost, gather, weights_of

if TYPE_CHECKING:
    from resblock_bench.bench.compiled.norms import Norm
    from resblock_bench.bench.grid.axes import Selection
    from resblock_bench.kernels.tiers import Tier

    from .host_time import HostTime

DEFAULT: Selection = {
    "channels": (256,),
    "resolution": (8, 32, 64, 256),
    "dtype": ("bf16",),
    "layout": ("nchw", "nhwc"),
}
"""One site for each tier, in both layouts."""

MODELS_DEFAULT: Selection = {"dtype": ("bf16",), "layout": ("nchw", "nhwc")}
"""Where models are named, they say the sites."""
_ADVICE = "name another file"


@dataclass(frozen=True)
class CostRequest:
    """What to cost: blocks, architectures (90 is 9.0), and a tier or else the rules' choice.

    published   every block of the published models instead, forward and backward: of the selection
                count batch, dtype and layout; bytes are the rules' and not counted, and the
                heaviest losses are shown rather than all
    """

    selection: Selection
    archs: Sequence[int]
    tier: Tier | None = None
    json: Path | None = None
    published: bool = False


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cost` found: of every direction, and the host's time of a call in each dtype."""

    costs: list[Cost]
    host: list[HostTime]


def carry_out(request: CostRequest, console: Console) -> int:
    """Cost everything asked for, show it, and write it as JSON if a path is given.

    Raises UsageError without Triton, for an unknown architecture and where the tier cannot hold any
    of the norms.
    """
    from . import table
    from .published_norms import published_weights

    _check(request)
    published = request.published
    weights = published_weights(request.selection) if published else weights_of(request.selection)
    costs, refused = gather(
        list(weights),
        request.archs,
        request.tier,
        console,
        by_rule=published,
        rewrite=not published,
    )
    host = host_times(weights)
    width = min(console.width, table.WIDTH)
    if published:
        console.print(table.worst_table(costs, weights), width=width)
    else:
        console.print(table.cost_table(costs), width=width)
        console.print(table.prediction_table(costs), width=width)
    console.print(table.host_table(host), width=width)
    if published:
        say(console, "bytes are what the tiers' rules expect; without --published they are counted")
    for line in (
        *table.cost_notes(costs, refused),
        *table.prediction_notes(costs, weights),
        table.HOST_NOTE,
    ):
        say(console, line)
    if request.json is not None:
        report = CostReport(costs=costs, host=host)
        files.write(request.json, files.as_json(report), _ADVICE, named=True)
        say(console, f"json: {request.json}")
    return exitcodes.OK


def tier_named(name: str) -> Tier:
    """The tier that a user names."""
    from resblock_bench.kernels.tiers import TIERS

    if name not in TIERS:
        raise unknown("tier", name, TIERS)
    return TIERS[name]


def _check(request: CostRequest) -> None:
    from resblock_bench.bench.compiled.machine_code import ARCHITECTURES
    from resblock_bench.kernels.dispatch import triton_installed

    if not triton_installed():
        raise UsageError("cost interprets and compiles Triton kernels, and Triton is not installed")
    for arch in request.archs:
        if arch not in ARCHITECTURES:
            raise unknown("architecture", str(arch), map(str, ARCHITECTURES))
    if request.json is not None:
        with files.explained(request.json, _ADVICE):
            files.check_writable(request.json, named=True)


def host_times(norms: Iterable[Norm]) -> list[HostTime]:
    """Of a call in each of the norms' dtypes; nothing else of ours runs meanwhile."""
    from .host_time import measure_host_time

    jobs = [Job(False, measure_host_time, (norm.dtype,)) for norm in norms]
    with closing(workers.run(jobs, 1)) as found:
        return [answer.get() for _, answer in found]
