"""What calls of the fused operator cost on a GPU that is absent: counted, compiled, predicted.

Interpreted and compiled kernels exclude each other within a process, so each kind has worker
processes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from rich.console import Console

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.machine.answers import answers
from resblock_bench.bench.machine.workers import Job
from resblock_bench.bench.records import site_of

if TYPE_CHECKING:
    from resblock_bench.bench.compiled.machine_code import KernelCode
    from resblock_bench.bench.compiled.norms import Direction, Norm, Traffic
    from resblock_bench.bench.grid.axes import Selection
    from resblock_bench.kernels.launch import Recorded
    from resblock_bench.kernels.tiers import Launch, Tier

    from .predictions import Predicted

_UNUSED = {"workload", "microbatch", "impl", "checkpoint", "mode"}
COUNTING = "counting bytes and compiling"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of one norm on one architecture."""

    norm: Norm
    direction: Direction
    arch: int
    launch: dict[str, Any]
    traffic: Traffic
    kernels: list[KernelCode]
    predicted: Predicted


def weights_of(selection: Selection) -> dict[Norm, int]:
    """Both norms of every selected block, each once, in order, with C·HW × how often it occurs.

    What PyTorch has no such block of is left out: dims=1 in channels-last, which is a default.
    """
    from resblock_bench.bench.compiled.norms import norms_of_block
    from resblock_bench.bench.measure.workload import unsupported

    wrong = sorted(set(selection) & _UNUSED)
    if wrong:
        raise UsageError(
            f"{', '.join(wrong)} changes nothing of what the fused kernels of a training step "
            "cost: leave it out"
        )
    planned = plan([selection])
    reasons = dict.fromkeys(unsupported(item.cell) for item in planned)
    if None not in reasons:
        raise UsageError(f"no block is left to cost: {'; '.join(filter(None, reasons))}")
    planned = [item for item in planned if unsupported(item.cell) is None]
    # Every variant of a site has the same norms.
    sites = {site_of(item.cell): item.multiplicity for item in planned}
    weights: dict[Norm, int] = {}
    for cell, count in sites.items():
        for norm in norms_of_block(cell):
            weights[norm] = weights.get(norm, 0) + norm.channels * norm.positions * count
    return weights


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

    def kernels(self) -> dict[str, list[Recorded]]:
        """The launches of each of its kernels, by name."""
        from resblock_bench.bench.compiled.norms import kernels_of

        return kernels_of(self.norm, self.direction, self.launch)

    def compilation(self, kernel: str) -> Job:
        """Compiles one of its kernels."""
        from resblock_bench.bench.compiled.norms import compile_kernel

        how = (self.norm, self.direction, self.launch, self.arch)
        return Job(False, compile_kernel, (*how, kernel))


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

    first: dict[object, Job] = {}
    found: dict[Call, list[tuple[Job, Launches]]] = {}
    for call in calls:
        found[call] = []
        for name, items in call.kernels().items():
            same = call.arch, compile_key(items[0])
            shared = first.setdefault(same, call.compilation(name))
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


def gather(
    norms: Sequence[Norm],
    archs: Sequence[int],
    tier: Tier | None,
    console: Console,
    *,
    by_rule: bool = False,
    rewrite: bool = True,
) -> tuple[list[Cost], list[str]]:
    """The costs in order, and why the others have none: the tier asked for cannot hold them.

    by_rule   bytes are those that the tiers' rules expect, and not counted
    rewrite   the rewrite is among the directions

    Raises JobFailed where a kernel cannot be interpreted or compiled.
    """
    from .expected_traffic import expected_traffic
    from .predictions import predict

    calls, refused = calls_of(norms, archs, tier)
    if not calls:
        raise UsageError(f"tier {tier} holds none of the {len(norms)} norms: {refused[0]}")
    compilations = shared_jobs(call for call in calls if rewrite or call.direction != "rewrite")
    jobs = [] if by_rule else [call.traffic() for call in compilations]
    jobs += [job for kernels in compilations.values() for job, _ in kernels]
    with closing(answers(jobs, console, COUNTING)) as found:
        values = {job: answer.get() for job, answer in found}
    costs = []
    for call, shared in compilations.items():
        traffic = (
            expected_traffic(call.norm, call.direction, call.launch)
            if by_rule
            else values[call.traffic()]
        )
        kernels = [msgspec.structs.replace(values[job], **how._asdict()) for job, how in shared]
        costs.append(
            Cost(
                norm=call.norm,
                direction=call.direction,
                arch=call.arch,
                launch=call.launch._asdict(),
                traffic=traffic,
                kernels=kernels,
                predicted=predict(*call, traffic, kernels),
            )
        )
    return costs, refused
