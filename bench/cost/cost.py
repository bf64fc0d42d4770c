"""`cost`: what the kernels cost at given sites, known on a machine without a GPU.

Every norm of the selected blocks, forward, rewritten and backward: bytes and sectors counted in
Triton's interpreter, machine code from cross-compilation, and a time predicted from both.
Interpreted and compiled kernels exclude each other within a process, so each kind has worker
processes of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from rich.console import Console

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.grid.grid import GROUPS, plan
from resblock_bench.bench.machine import environment, workers
from resblock_bench.bench.machine.workers import Answer, Job
from resblock_bench.bench.records import site_of
from resblock_bench.bench.sweep.progress import task_progress

if TYPE_CHECKING:
    from resblock_bench.bench.compiled.norms import Direction, KernelCode, Norm, Traffic
    from resblock_bench.bench.grid.axes import Selection
    from resblock_bench.bench.records import Cell
    from resblock_bench.kernels.tiers import Launch, Tier

    from .host_time import HostTime
    from .predictions import Predicted

DEFAULT: Selection = {
    "channels": (256,),
    "resolution": (8, 32, 64, 256),
    "dtype": ("bf16",),
    "layout": ("nchw", "nhwc"),
}
"""One site for each tier, in both layouts."""

MODELS_DEFAULT: Selection = {"dtype": ("bf16",), "layout": ("nchw", "nhwc")}
"""Where models are named, they say the sites."""


@dataclass(frozen=True)
class Request:
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


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of one norm on one architecture."""

    norm: Norm
    direction: Direction
    arch: int
    launch: dict[str, Any]
    traffic: Traffic
    kernels: list[KernelCode]
    predicted: Predicted


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `cost` found: of every direction, and the host's time of a call in each dtype."""

    costs: list[Cost]
    host: list[HostTime]


def carry_out(request: Request, console: Console) -> int:
    """Cost everything asked for, show it, and write it as JSON if a path is given.

    Raises UsageError without Triton, for an unknown architecture and where the tier cannot hold any
    of the norms.
    """
    from . import host_table, prediction_table
    from . import table as cost_table
    from .published_norms import published_weights

    _check(request)
    weights = (
        published_weights(request.selection) if request.published else weights_of(request.selection)
    )
    collect = survey if request.published else gather
    costs, refused = collect(list(weights), request.archs, request.tier, console)
    host = host_times(weights)
    predicted = prediction_table.table(costs)
    if request.published:
        predicted = prediction_table.worst(costs, weights)
    width = min(console.width, cost_table.WIDTH)
    lines = [
        *cost_table.notes(costs, refused),
        *prediction_table.notes(costs, weights),
        host_table.NOTE,
    ]
    if request.published:
        lines.insert(
            0, "bytes are what the tiers' rules expect; without --published they are counted"
        )
    else:
        console.print(cost_table.table(costs), width=width)
    console.print(predicted, width=width)
    console.print(host_table.table(host), width=width)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if request.json is not None:
        _write(request.json, Report(costs=costs, host=host))
        console.print(f"json: {request.json}", markup=False, highlight=False, soft_wrap=True)
    return exitcodes.OK


def tier_named(name: str) -> Tier:
    """The tier that a user names."""
    from resblock_bench.kernels.tiers import TIERS

    if name not in TIERS:
        raise unknown("tier", name, TIERS)
    return TIERS[name]


def _check(request: Request) -> None:
    from resblock_bench.bench.compiled.machine_code import ARCHITECTURES
    from resblock_bench.kernels.dispatch import triton_installed

    if not triton_installed():
        raise UsageError("cost interprets and compiles Triton kernels, and Triton is not installed")
    for arch in request.archs:
        if arch not in ARCHITECTURES:
            raise unknown("architecture", str(arch), map(str, ARCHITECTURES))
    if request.json is not None:
        _require_writable(request.json)


def norms_of(selection: Selection) -> list[Norm]:
    """Both norms of every selected block, each once, in order."""
    return list(weights_of(selection))


def weights_of(selection: Selection) -> dict[Norm, int]:
    """Both norms of every selected block, each once, in order, with C·HW × how often it occurs."""
    from resblock_bench.bench.measure.workload import unsupported

    planned = plan([selection])
    for reason in filter(None, (unsupported(item.cell) for item in planned)):
        raise UsageError(f"{reason}: ask for layout=nchw")
    # Every variant of a site has the same norms.
    sites = {site_of(item.cell): item.multiplicity for item in planned}
    weights: dict[Norm, int] = {}
    for cell, count in sites.items():
        for norm in norms_of_cell(cell):
            weights[norm] = weights.get(norm, 0) + norm.channels * norm.positions * count
    return weights


def norms_of_cell(cell: Cell) -> Iterator[Norm]:
    """As the fused block runs them on a GPU: conv1's bias is in the add before the second norm."""
    from resblock_bench.bench.compiled.norms import Norm

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


class Call(NamedTuple):
    """One direction of one norm on one architecture."""

    norm: Norm
    direction: Direction
    arch: int
    launch: Launch

    def traffic(self) -> Job:
        """Counts its bytes; the same job as that of an architecture that launches alike."""
        from resblock_bench.bench.compiled.norms import count_traffic, counted_launch

        launch = counted_launch(self.launch)
        return Job(True, count_traffic, (self.norm, self.direction, launch))

    def kernels(self) -> dict[str, Job]:
        """Compiles its kernels, by name."""
        from resblock_bench.bench.compiled.norms import compile_kernel, kernels_of

        names = kernels_of(self.norm, self.direction, self.launch)
        how = (self.norm, self.direction, self.launch, self.arch)
        return {name: Job(False, compile_kernel, (*how, name)) for name in names}


class Launches(NamedTuple):
    """How a call launches one of its kernels."""

    kernel: str
    launches: int
    programs: int


def shared_jobs(calls: Iterable[Call]) -> dict[Call, list[tuple[Job, Launches]]]:
    """For each kernel of a call the job that compiles it, and how this call launches it.

    Calls whose kernels become the same machine code share the job of the first of them: the
    published sites have several times as many launches as kernels.
    """
    from resblock_bench.bench.compiled.kernel_key import compile_key
    from resblock_bench.bench.compiled.norms import kernels_of

    first: dict[object, Job] = {}
    found: dict[Call, list[tuple[Job, Launches]]] = {}
    for call in calls:
        recorded = kernels_of(call.norm, call.direction, call.launch)
        found[call] = []
        for name, job in call.kernels().items():
            items = recorded[name]
            shared = first.setdefault((call.arch, compile_key(items[0])), job)
            how = Launches(name, len(items), sum(item.grid[0] for item in items))
            found[call].append((shared, how))
    return found


def calls_of(
    norms: Iterable[Norm], archs: Iterable[int], tier: Tier | None
) -> tuple[list[Call], list[str]]:
    """Every direction in order, and why the others are left out: the tier cannot hold them."""
    from resblock_bench.bench.compiled import norms as norm_cost

    calls: list[Call] = []
    refused: list[str] = []
    for norm, direction, arch in product(norms, norm_cost.DIRECTIONS, archs):
        if direction == "rewrite" and tier is not None:
            continue
        try:
            launch = norm_cost.launch_of(norm, direction, arch, tier)
        except ValueError as error:
            refused.append(str(error))
        else:
            calls.append(Call(norm, direction, arch, launch))
    return calls, refused


def answers(jobs: Iterable[Job], console: Console) -> Generator[tuple[Job, Answer], None, None]:
    """What each job came to, with progress on the console."""
    wanted = list(dict.fromkeys(jobs))
    with (
        task_progress(console, "counting bytes and compiling", len(wanted)) as advance,
        closing(workers.run(wanted, environment.usable_cpus())) as found,
    ):
        for job, answer in found:
            advance()
            yield job, answer


def gather(
    norms: Sequence[Norm], archs: Sequence[int], tier: Tier | None, console: Console
) -> tuple[list[Cost], list[str]]:
    """The costs in order, and why the others have none: the tier asked for cannot hold them.

    Raises JobFailed where a kernel cannot be interpreted or compiled.
    """
    calls, refused = calls_of(norms, archs, tier)
    if not calls:
        raise UsageError(f"tier {tier} holds none of the {len(norms)} norms: {refused[0]}")
    jobs = shared_jobs(calls)
    counted = {call: call.traffic() for call in calls}
    values = _values([*counted.values(), *_compilations(jobs)], console)
    traffic = {call: values[job] for call, job in counted.items()}
    return _costs(jobs, values, traffic), refused


def survey(
    norms: Sequence[Norm],
    archs: Sequence[int],
    tier: Tier | None,
    console: Console,
    *,
    rewrite: bool = False,
) -> tuple[list[Cost], list[str]]:
    """As `gather`, rewriting only if asked for, with the traffic that the rules expect."""
    from .expected_traffic import expected_traffic

    calls, refused = calls_of(norms, archs, tier)
    jobs = shared_jobs(call for call in calls if rewrite or call.direction != "rewrite")
    values = _values(_compilations(jobs), console)
    traffic = {call: expected_traffic(call.norm, call.direction, call.launch) for call in jobs}
    return _costs(jobs, values, traffic), refused


Jobs = dict["Call", list[tuple[Job, "Launches"]]]


def _compilations(jobs: Jobs) -> list[Job]:
    return [job for kernels in jobs.values() for job, _ in kernels]


def _values(jobs: Iterable[Job], console: Console) -> dict[Job, Any]:
    with closing(answers(jobs, console)) as found:
        return {job: answer.get() for job, answer in found}


def _costs(jobs: Jobs, values: dict[Job, Any], traffic: dict[Call, Traffic]) -> list[Cost]:
    costs = []
    for call, kernels in jobs.items():
        codes = [msgspec.structs.replace(values[job], **how._asdict()) for job, how in kernels]
        costs.append(_cost(call, traffic[call], codes))
    return costs


def _cost(call: Call, traffic: Traffic, kernels: list[KernelCode]) -> Cost:
    from .predictions import predict

    return Cost(
        norm=call.norm,
        direction=call.direction,
        arch=call.arch,
        launch=call.launch._asdict(),
        traffic=traffic,
        kernels=kernels,
        predicted=predict(call.norm, call.direction, call.arch, call.launch, traffic, kernels),
    )


def host_times(norms: Iterable[Norm]) -> list[HostTime]:
    """Of a call in each of the norms' dtypes; nothing else of ours runs meanwhile."""
    from .host_time import measure_host_time

    jobs = [Job(False, measure_host_time, (norm.dtype,)) for norm in norms]
    with closing(workers.run(jobs, 1)) as found:
        return [answer.get() for _, answer in found]


def _write(path: Path, report: Report) -> None:
    data = msgspec.json.format(msgspec.json.encode(report), indent=1)
    with _explained(path):
        path.write_bytes(data + b"\n")


def _require_writable(path: Path) -> None:
    """Before minutes of work. What the path holds stays, and it is not made."""
    with _explained(path):
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): name another file"
        ) from None
