"""One cell in, one row out: checked, then measured, whatever happens on the way.

`measure` runs in the cell's own process, which takes turns with those of other variants while it is
timed. What a row holds besides measurements is the task's, so that the process that waits can write
the row of a cell that never answered.
"""

import datetime
import gc
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from msgspec import Struct, field
from msgspec.structs import asdict, replace

from resblock_bench.bench.errors import first_line
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.records import (
    SCHEMA_VERSION,
    Cell,
    Contract,
    Correctness,
    Count,
    Environment,
    Floor,
    Memory,
    Positive,
    Record,
    Row,
    Rule,
    Status,
    StopRule,
    cell_id,
)

from . import orders, stats
from .correctness import LAST_INPUTS, check
from .cuda_graph import CaptureError, capture
from .devices import TOOLS, Device, Kind, open_device
from .fingerprint import code_of_cell
from .floor import floor_of
from .implementations import caution, declined, packages_of, unusable_here, versions_of
from .kinds import KINDS
from .memory import MemoryMeter
from .memory_limit import limit_memory
from .origin import Origin
from .out_of_memory import is_out_of_memory
from .peers import DeclinedError
from .snapshot import recording
from .telemetry import open_probe
from .timing import Sampler, WarmUp, time_fn
from .truth_file import FIRST, LAST, read_truth
from .workload import Workload

SNAPSHOTS = "snapshots"
TURNS = "the variants of a block, a burst each, in an order drawn anew for every round"


class Task(Record, frozen=True, kw_only=True):
    """A cell with all that its process needs to know; it travels as JSON.

    `memory_limit_bytes` is what a cell on a CPU may allocate, None for what is free; `folder` the
    run's, which takes a snapshot where memory runs out, None where it cannot be reached.
    """

    cell: Cell
    multiplicity: Positive
    attempt: Positive
    device: Kind
    rule: Rule
    seed: int
    environment: Environment
    memory_limit_bytes: Count | None
    folder: str | None


class CellJob(Struct, kw_only=True):
    """A task to measure, in turns with its block's other variants.

    truths   the folder of the site's truths
    memory   whether it is measured, too, and a graph's replay
    cpus     that the process computes on; none are those it has
    origin   where the code that is measured has to come from
    """

    task: Task
    truths: str
    memory: bool = True
    cpus: list[int] = field(default_factory=list)
    origin: Origin | None = None


def contract_of(task: Task) -> Contract:
    """The conditions under which a task's cell is timed."""
    tools, kind = TOOLS[task.device], KINDS[task.cell.workload]
    return Contract(
        **asdict(task.rule),
        turns=TURNS,
        device=task.device,
        timer=tools.timer.name,
        threads=task.environment.threads,
        l2=tools.timer.l2,
        backend=tools.backend,
        seed=task.seed,
        step=kind.steps[task.cell.mode],
        precision=kind.precision,
        inputs=kind.inputs,
    )


def id_of(task: Task) -> str:
    """The id that the task's row will have."""
    return cell_id(task.cell, contract_of(task), code_of_cell(task.cell))


def row_of(task: Task, status: Status, reason: str | None = None, **found: Any) -> Row:
    """The row of a task with what was found; all else is null."""
    contract, environment, code = contract_of(task), task.environment, code_of_cell(task.cell)
    now = datetime.datetime.now(datetime.timezone.utc)
    return Row(
        **{
            **dict.fromkeys(Row.__struct_fields__),
            "schema_version": SCHEMA_VERSION,
            "id": cell_id(task.cell, contract, code),
            "attempt": task.attempt,
            "status": status,
            "reason": reason,
            "axes": task.cell,
            "multiplicity": task.multiplicity,
            "memory_limit_bytes": task.memory_limit_bytes,
            "contract": contract,
            "code": code,
            "device_name": (environment.gpu if task.device == "cuda" else environment.cpu) or "CPU",
            "device_uuid": environment.gpu_uuid if task.device == "cuda" else None,
            "host": platform.node(),
            "versions": {**environment.versions, **versions_of(task.cell)},
            "commit": environment.commit,
            "dirty": environment.dirty,
            "seed": task.seed,
            "started_at": now.isoformat(timespec="seconds"),
            **found,
        }
    )


def measure(job: CellJob, channel: Channel) -> Row:
    """The row of a cell; conditions and ratios are known to who waits. An exception becomes the
    row's status and reason; only interrupts pass.

    What was measured before an exception stays in the row.
    """
    started_s, waited_s = time.monotonic(), channel.waited_s
    task = job.task
    row = row_of(task, "failed")
    try:
        for found in _steps(job, channel):
            row = replace(row, **asdict(found))
    except Exception as error:
        row = replace(row, status=status_of(error), reason=reason_of(error))
    if row.status in ("wrong", "failed") and (known := caution(task.cell.impl)):
        row = replace(row, reason=f"{row.reason}; {known}")
    snapshot = _snapshot_file(task)
    if snapshot is not None and snapshot.exists():
        row = replace(row, snapshot=f"{SNAPSHOTS}/{snapshot.name}")
    own_s = time.monotonic() - started_s - (channel.waited_s - waited_s)
    return replace(row, wall_s=max(0.0, own_s))


def _snapshot_file(task: Task) -> Path | None:
    """For PyTorch's memory viewer, where the GPU's memory runs out."""
    if task.folder is None:
        return None
    return Path(task.folder) / SNAPSHOTS / f"{id_of(task)}-{task.attempt}.pickle"


def _steps(job: CellJob, channel: Channel) -> Iterator[Struct]:
    """Measure step by step: what each finds are fields of the row, and the last status stands."""
    task = job.task
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    before = set(sys.modules)
    unusable = unusable_here(task.cell.impl, task.device)
    if unusable is not None:
        yield CellStatus("skipped", unusable)
        return
    device = open_device(task.device, task.environment.threads)
    yield OpenedDevice(device.name, device.uuid)
    channel.announce("check")
    meter = device.meter if job.memory else None
    with recording(device.torch_device, _snapshot_file(task)):
        checked = checked_workload(task, Path(job.truths) / FIRST, device, meter)
        if job.origin is not None:
            job.origin.hold(packages_of(task.cell.impl), before)
        yield checked.verdict
        if checked.verdict.status == "wrong":
            return
        if job.memory:
            channel.announce("memory")
            yield _needed(task, checked, device)
    channel.announce("timing")
    yield _timed(task, checked.workload, device, channel)
    channel.announce("last check")
    last = _checked_again(task, checked, Path(job.truths) / LAST, device)
    yield last
    if last.status == "ok" and device.kind == "cuda" and job.memory:
        # Last, since a graph's memory pool stays.
        yield _replayed(task, checked.workload, device)


class CellStatus(Struct, frozen=True):
    """What a cell came to."""

    status: Status
    reason: str | None


class Verified(CellStatus, frozen=True):
    """Of the check, "ok" or "wrong"."""

    correctness: Correctness


class OpenedDevice(Struct, frozen=True):
    """The device that measures."""

    device_name: str
    device_uuid: str | None


class Needed(Struct, frozen=True):
    """The memory that a step needs, or why it cannot be measured."""

    memory: Memory | None
    memory_note: str | None


class Timed(WarmUp, frozen=True, kw_only=True):
    """The samples, and what follows from them."""

    samples_ms: list[float]
    rounds: list[int]
    stop_rule: StopRule
    median_ms: float
    ci_low_ms: float | None
    ci_high_ms: float | None
    outliers: int
    throughput_images_per_s: float
    floor: Floor | None


class Replayed(Struct, frozen=True, kw_only=True):
    """The same step replayed by a CUDA graph, or why it was not."""

    graph_samples_ms: list[float] | None = None
    graph_median_ms: float | None = None
    graph_note: str | None = None


class Checked(NamedTuple):
    """A cell made runnable and held against its truth.

    `cold_peak_bytes` is the peak of its first step, None where it cannot be measured.
    """

    workload: Workload
    verdict: Verified
    cold_peak_bytes: int | None


def checked_workload(
    task: Task, truth_file: Path, device: Device, meter: MemoryMeter | None = None
) -> Checked:
    """Limit the memory, make a task's cell runnable, make its first step, and check the results.

    meter   measures the peak of the first step; None leaves it out
    """
    cell, seed = task.cell, task.seed
    truth = read_truth(truth_file)
    if task.memory_limit_bytes is not None:
        limit_memory(task.memory_limit_bytes)
    kind = KINDS[cell.workload]
    weights = kind.draw_weights(cell, seed)
    inputs = kind.draw_inputs(cell, device.torch_device, seed)
    workload = kind.make(cell, weights, inputs, device.torch_device)
    cold_peak_bytes = None
    if meter is not None and meter.unusable(cell.impl) is None:
        results, cold_peak_bytes = meter.first_results(workload)
    else:
        results = workload.results()
    if cell.dropout:
        del results
        with workload.as_checked(weights) as plain:
            results = plain.results()
    right, correctness = check(results, truth)
    verdict = Verified("ok", None, correctness)
    if not right:
        verdict = Verified("wrong", _worst(correctness), correctness)
    return Checked(workload, verdict, cold_peak_bytes)


def _worst(correctness: Correctness) -> str:
    worst = correctness.worst
    error, limit = correctness.errors[worst], correctness.limits[worst]
    shown = "NaN or infinite" if error is None else error
    return f"{worst}: relative error {shown} is above its limit {limit}"


def _needed(task: Task, checked: Checked, device: Device) -> Needed:
    # An allocator cannot tell what is left of the check from what the measured step allocates.
    gc.collect()
    note = device.meter.unusable(task.cell.impl)
    if note is not None:
        return Needed(None, note)
    return Needed(device.meter.measure(checked.workload, checked.cold_peak_bytes), None)


def _timed(task: Task, workload: Workload, device: Device, channel: Channel) -> Timed:
    """Warm up, say so, and take bursts as ordered."""
    probe = open_probe(device.kind, device.uuid)
    sampler = Sampler(workload.step, device.timer, prepare=workload.freshen)
    torch.manual_seed(task.seed)  # the masks of dropout
    bursts: list[list[float]] = []
    answer: orders.Response = orders.Ready()
    stop_rule: StopRule | None = None
    try:
        warmup = sampler.warm_up(task.rule, lambda: probe.read().sm_clock_mhz)
        while stop_rule is None:
            channel.send(msgspec.json.encode(answer))
            match msgspec.json.decode(channel.receive(), type=orders.Order):
                case orders.Redraw():
                    workload.redraw()
                    sampler.sample_ms()
                    answer = orders.Ready()
                case orders.Burst(seconds, most):
                    bursts.append(list(islice(sampler.burst(seconds), most)))
                    answer = orders.Samples(bursts[-1])
                case orders.ReadEnergy():
                    answer = orders.Energy(probe.energy_j())
                case orders.Read():
                    answer = orders.Counters(probe.source, probe.read())
                case orders.Finish(stop_rule):
                    pass
    finally:
        probe.close()
        device.timer.close()
    samples, batch = list(chain(*bursts)), task.cell.batch
    median_ms = statistics.median(samples)
    low, high = stats.median_interval(samples, task.rule.confidence) or (None, None)
    ceilings = task.environment.ceilings
    return Timed(
        **asdict(warmup),
        samples_ms=samples,
        rounds=list(map(len, bursts)),
        stop_rule=stop_rule,
        median_ms=median_ms,
        ci_low_ms=low,
        ci_high_ms=high,
        outliers=stats.outlier_count(samples),
        throughput_images_per_s=batch / median_ms * 1e3,
        floor=None if ceilings is None else floor_of(task.cell, ceilings, median_ms),
    )


def _checked_again(task: Task, checked: Checked, truth_file: Path, device: Device) -> CellStatus:
    """The same step with other inputs: what was kept from before is wrong now."""
    kind = KINDS[task.cell.workload]
    weights = kind.draw_weights(task.cell, task.seed)
    with checked.workload.as_checked(weights) as plain:
        plain.refill(kind.draw_inputs(task.cell, device.torch_device, task.seed + LAST_INPUTS))
        right, correctness = check(plain.results(copied=True), read_truth(truth_file))
    if right:
        return CellStatus("ok", None)
    return CellStatus("wrong", f"with other inputs than at first, {_worst(correctness)}")


def _replayed(task: Task, workload: Workload, device: Device) -> Replayed:
    """Without the host's cost of launching the step."""
    try:
        samples = time_fn(capture(workload), device.timer, task.rule).samples_ms
    except CaptureError as error:
        return Replayed(graph_note=str(error))
    except Exception as error:  # the eager figures stand
        return Replayed(graph_note=reason_of(error))
    return Replayed(graph_samples_ms=samples, graph_median_ms=statistics.median(samples))


def status_of(error: Exception) -> Status:
    """What an exception means for a row."""
    if is_out_of_memory(error):
        return "oom"
    return "skipped" if declined(error) else "failed"


def reason_of(error: Exception) -> str:
    """Class, first line, and the innermost line of code, which is where a reader starts."""
    if isinstance(error, DeclinedError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{first_line(error)}{place}"
