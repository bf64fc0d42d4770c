"""One cell in, one row out: checked, then measured, whatever happens on the way.

`measure` runs in the cell's own process. What a row holds besides measurements is the task's, so
that the process that waits can write the row of a cell that never answered.
"""

import datetime
import gc
import platform
import statistics
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec import Struct
from msgspec.structs import asdict, replace

from resblock_bench.bench.errors import first_line
from resblock_bench.bench.machine.process import Announce
from resblock_bench.bench.records import (
    SCHEMA_VERSION,
    Cell,
    Conditions,
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
    cell_id,
)

from . import stats
from .conditions import conditions
from .correctness import check, checked_cell
from .cuda_graph import CaptureError, capture
from .devices import TOOLS, Device, Kind, open_device
from .fingerprint import code_fingerprint
from .floor import floor_of, impossible
from .implementations import IMPLEMENTATIONS, could_not_compile
from .memory import MemoryMeter
from .memory_limit import limit_memory
from .out_of_memory import is_out_of_memory
from .snapshot import recording
from .telemetry import Reading, open_probe
from .timing import Timing, time_fn
from .truth_file import read_truth
from .workload import INPUTS, PRECISION, STEPS, Workload, draw_inputs, draw_weights

SNAPSHOTS = "snapshots"


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


def contract_of(task: Task) -> Contract:
    """The conditions under which a task's cell is timed."""
    tools = TOOLS[task.device]
    return Contract(
        **asdict(task.rule),
        device=task.device,
        timer=tools.timer.name,
        threads=task.environment.threads,
        l2=tools.timer.l2,
        backend=tools.backend,
        seed=task.seed,
        step=STEPS[task.cell.mode],
        precision=PRECISION,
        inputs=INPUTS,
    )


def id_of(task: Task) -> str:
    """The id that the task's row will have."""
    return cell_id(task.cell, contract_of(task), code_fingerprint())


def row_of(task: Task, status: Status, reason: str | None = None, **found: Any) -> Row:
    """The row of a task with what was found; all else is null."""
    contract, environment = contract_of(task), task.environment
    now = datetime.datetime.now(datetime.timezone.utc)
    return Row(
        **{
            **dict.fromkeys(Row.__struct_fields__),
            "schema_version": SCHEMA_VERSION,
            "id": cell_id(task.cell, contract, code_fingerprint()),
            "attempt": task.attempt,
            "status": status,
            "reason": reason,
            "axes": task.cell,
            "multiplicity": task.multiplicity,
            "memory_limit_bytes": task.memory_limit_bytes,
            "contract": contract,
            "code": code_fingerprint(),
            "device_name": (environment.gpu if task.device == "cuda" else environment.cpu) or "CPU",
            "device_uuid": environment.gpu_uuid if task.device == "cuda" else None,
            "host": platform.node(),
            "versions": environment.versions,
            "commit": environment.commit,
            "dirty": environment.dirty,
            "seed": task.seed,
            "started_at": now.isoformat(timespec="seconds"),
            **found,
        }
    )


def measure(task: Task, truth: Path, announce: Announce = lambda phase: None) -> Row:
    """The row of a cell. An exception becomes the row's status and reason; only interrupts pass.

    truth       the file of the site's truth
    announce    told which phase begins

    What was measured before an exception stays in the row.
    """
    started = time.monotonic()
    row = row_of(task, "failed")
    try:
        for found in _steps(task, truth, announce):
            row = replace(row, **asdict(found))
    except Exception as error:
        row = replace(row, status=status_of(error), reason=reason_of(error))
    snapshot = _snapshot_file(task)
    if snapshot is not None and snapshot.exists():
        row = replace(row, snapshot=f"{SNAPSHOTS}/{snapshot.name}")
    return replace(row, wall_s=time.monotonic() - started)


def _snapshot_file(task: Task) -> Path | None:
    """For PyTorch's memory viewer, where the GPU's memory runs out."""
    if task.folder is None:
        return None
    return Path(task.folder) / SNAPSHOTS / f"{id_of(task)}-{task.attempt}.pickle"


def _steps(task: Task, truth: Path, announce: Announce) -> Iterator[Struct]:
    """Measure step by step: what each finds are fields of the row, and the last status stands."""
    unusable = IMPLEMENTATIONS[task.cell.impl].unusable(task.device)
    if unusable is not None:
        yield CellStatus("skipped", unusable)
        return
    device = open_device(task.device, task.environment.threads)
    yield OpenedDevice(device.name, device.uuid)
    announce("check")
    with recording(device.torch_device, _snapshot_file(task)):
        checked = checked_workload(task, truth, device, device.meter)
        yield checked.verdict
        if checked.verdict.status == "wrong":
            return
        announce("memory")
        yield _needed(task, checked, device)
    announce("timing")
    timed = _timed(task, checked.workload, device)
    yield timed
    yield _judged(task, timed)
    if device.kind == "cuda":
        # Last, since a graph's memory pool stays.
        yield _replayed(task, checked.workload, device)


class CellStatus(Struct, frozen=True):
    """What a cell came to."""

    status: Status
    reason: str | None


class Verified(CellStatus, frozen=True):
    """Of the check, "ok" or "wrong"."""

    correctness: Correctness


class Judged(CellStatus, frozen=True):
    """Of the timing, "ok" or "impossible" by the machine's ceilings."""

    floor: Floor | None


class OpenedDevice(Struct, frozen=True):
    """The device that measures."""

    device_name: str
    device_uuid: str | None


class Needed(Struct, frozen=True):
    """The memory that a step needs, or why it cannot be measured."""

    memory: Memory | None
    memory_note: str | None


class Timed(Timing, frozen=True, kw_only=True):
    """The samples, what follows from them, and what the machine went through meanwhile."""

    median_ms: float
    ci_low_ms: float | None
    ci_high_ms: float | None
    outliers: int
    throughput_images_per_s: float
    conditions: Conditions


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
    weights = draw_weights(cell, seed)
    inputs = draw_inputs(cell, device.torch_device, seed)
    workload = Workload(cell, weights, inputs, device.torch_device)
    cold_peak_bytes = None
    if meter is not None and meter.unusable(cell.impl) is None:
        results, cold_peak_bytes = meter.first_results(workload)
    else:
        results = workload.results()
    if cell.dropout:
        results = Workload(checked_cell(cell), weights, inputs, device.torch_device).results()
    right, correctness = check(results, truth)
    verdict = Verified("ok", None, correctness)
    if not right:
        worst = correctness.worst
        error, limit = correctness.errors[worst], correctness.limits[worst]
        shown = "NaN or infinite" if error is None else error
        reason = f"{worst}: relative error {shown} is above its limit {limit}"
        verdict = Verified("wrong", reason, correctness)
    return Checked(workload, verdict, cold_peak_bytes)


def _needed(task: Task, checked: Checked, device: Device) -> Needed:
    # An allocator cannot tell what is left of the check from what the measured step allocates.
    gc.collect()
    note = device.meter.unusable(task.cell.impl)
    if note is not None:
        return Needed(None, note)
    return Needed(device.meter.measure(checked.workload, checked.cold_peak_bytes), None)


def _timed(task: Task, workload: Workload, device: Device) -> Timed:
    probe = open_probe(device.kind, device.uuid)
    readings: list[Reading] = []
    torch.manual_seed(task.seed)  # the masks of dropout
    try:
        timing = time_fn(
            workload.step,
            device.timer,
            task.rule,
            prepare=workload.reset,
            warm=lambda: readings.append(probe.read()),
            clock_mhz=lambda: probe.read().sm_clock_mhz,
        )
        readings.append(probe.read())
    finally:
        probe.close()
    samples, batch, threads = timing.samples_ms, task.cell.batch, task.environment.threads
    median_ms = statistics.median(samples)
    low, high = stats.median_interval(samples, task.rule.confidence) or (None, None)
    images = batch * len(samples)
    return Timed(
        **asdict(timing),
        median_ms=median_ms,
        ci_low_ms=low,
        ci_high_ms=high,
        outliers=stats.outlier_count(samples),
        throughput_images_per_s=batch / median_ms * 1e3,
        conditions=conditions(*readings, source=probe.source, images=images, threads=threads),
    )


def _judged(task: Task, timed: Timed) -> Judged:
    ceilings = task.environment.ceilings
    if ceilings is None:
        return Judged("ok", None, None)
    floor = floor_of(task.cell, ceilings, timed.median_ms)
    reason = impossible(floor, ceilings, min(timed.samples_ms))
    return Judged("ok" if reason is None else "impossible", reason, floor)


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
    return "skipped" if could_not_compile(error) else "failed"


def reason_of(error: Exception) -> str:
    """Class, first line, and the innermost line of code, which is where a reader starts."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{first_line(error)}{place}"
