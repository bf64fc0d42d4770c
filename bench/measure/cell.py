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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from resblock_bench.bench.machine.process import Announce
from resblock_bench.bench.records import (
    SCHEMA_VERSION,
    Cell,
    Conditions,
    Contract,
    Correctness,
    Count,
    Environment,
    Positive,
    Record,
    Row,
    Status,
    cell_id,
)

from . import stats
from .conditions import conditions
from .correctness import Truth, check, checked_cell
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
from .timing import Rule, Timing, time_fn
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
    rule, tools = task.rule, TOOLS[task.device]
    return Contract(
        device=task.device,
        timer=tools.timer.name,
        threads=task.environment.threads,
        warmup_s=rule.warmup_s,
        warmup_max_s=rule.warmup_max_s,
        warmup_min_steps=rule.warmup_min_steps,
        steady=rule.steady,
        burst_s=rule.burst_s,
        gap_s=rule.gap_s,
        confidence=rule.confidence,
        rel_half_width=rule.rel_half_width,
        min_samples=rule.min_samples,
        max_samples=rule.max_samples,
        max_time_s=rule.max_time_s,
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
    found: dict[str, Any] = {}
    try:
        reason = IMPLEMENTATIONS[task.cell.impl].unusable(task.device)
        if reason is not None:
            found |= {"status": "skipped", "reason": reason}
        else:
            _measure(task, truth, announce, found)
    except Exception as error:
        found |= {"status": status_of(error), "reason": reason_of(error)}
    snapshot = _snapshot_file(task)
    if snapshot is not None and snapshot.exists():
        found["snapshot"] = f"{SNAPSHOTS}/{snapshot.name}"
    return replace(row, **found, wall_s=time.monotonic() - started)


def _snapshot_file(task: Task) -> Path | None:
    """For PyTorch's memory viewer, where the GPU's memory runs out."""
    if task.folder is None:
        return None
    return Path(task.folder) / SNAPSHOTS / f"{id_of(task)}-{task.attempt}.pickle"


def _measure(task: Task, truth_file: Path, announce: Announce, found: dict[str, Any]) -> None:
    """Put into `found` what there is to find, step by step."""
    device = open_device(task.device, task.environment.threads)
    found |= {"device_name": device.name, "device_uuid": device.uuid}
    announce("check")
    truth = read_truth(truth_file)
    if task.memory_limit_bytes is not None:
        limit_memory(task.memory_limit_bytes)
    with recording(device.torch_device, _snapshot_file(task)):
        checked = checked_workload(task, truth, device, device.meter)
        found["correctness"] = checked.correctness
        # An allocator cannot tell it from what the measured step allocates.
        del truth
        gc.collect()
        if checked.wrong is not None:
            found |= {"status": "wrong", "reason": checked.wrong}
            return
        workload = checked.workload
        announce("memory")
        found["memory_note"] = device.meter.unusable(task.cell.impl)
        if found["memory_note"] is None:
            found["memory"] = device.meter.measure(workload, checked.cold_peak_bytes)
    announce("timing")
    timing, found["conditions"] = _timed(task, workload, device)
    found |= {"status": "ok", "reason": None}
    _add_timing(timing, task, found)
    if device.kind == "cuda":
        # Last, since a graph's memory pool stays.
        found |= _graph_fields(task, workload, device)


class Checked(NamedTuple):
    """A cell made runnable and held against its truth.

    `cold_peak_bytes` is the peak of its first step, None where it cannot be measured; `wrong` says
    which error is above its limit, None where none is.
    """

    workload: Workload
    correctness: Correctness
    cold_peak_bytes: int | None
    wrong: str | None


def checked_workload(
    task: Task, truth: Truth, device: Device, meter: MemoryMeter | None = None
) -> Checked:
    """Make a task's cell runnable, make its first step, and check the results.

    meter   measures the peak of the first step; None leaves it out
    """
    cell, seed = task.cell, task.seed
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
    wrong = None
    if not right:
        worst = correctness.worst
        error, limit = correctness.errors[worst], correctness.limits[worst]
        wrong = f"{worst}: relative error {error} is above its limit {limit}"
    return Checked(workload, correctness, cold_peak_bytes, wrong)


def _timed(task: Task, workload: Workload, device: Device) -> tuple[Timing, Conditions]:
    """The samples, and what the machine went through while they were taken."""
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
    images = task.cell.batch * len(timing.samples_ms)
    threads = task.environment.threads
    return timing, conditions(*readings, source=probe.source, images=images, threads=threads)


def _add_timing(timing: Timing, task: Task, found: dict[str, Any]) -> None:
    median_ms = statistics.median(timing.samples_ms)
    low, high = stats.median_interval(timing.samples_ms, task.rule.confidence) or (None, None)
    found |= {
        "samples_ms": timing.samples_ms,
        "bursts": timing.bursts,
        "median_ms": median_ms,
        "ci_low_ms": low,
        "ci_high_ms": high,
        "stop_rule": timing.stop_rule,
        "outliers": stats.outlier_count(timing.samples_ms),
        "warmup_steps": timing.warmup_steps,
        "warmup_s": timing.warmup_s,
        "warmup_steady": timing.warmup_steady,
        "throughput_images_per_s": task.cell.batch / median_ms * 1e3,
    }
    ceilings = task.environment.ceilings
    if ceilings is not None:
        found["floor"] = floor_of(task.cell, ceilings, median_ms)
        reason = impossible(found["floor"], ceilings, min(timing.samples_ms))
        if reason is not None:
            found |= {"status": "impossible", "reason": reason}


def _graph_fields(task: Task, workload: Workload, device: Device) -> dict[str, Any]:
    """The same step replayed by a CUDA graph, without the host's cost of launching it."""
    try:
        timing = time_fn(capture(workload), device.timer, task.rule)
    except CaptureError as error:
        return {"graph_note": str(error)}
    except Exception as error:  # the eager figures stand
        return {"graph_note": reason_of(error)}
    samples = timing.samples_ms
    return {"graph_samples_ms": samples, "graph_median_ms": statistics.median(samples)}


def status_of(error: Exception) -> Status:
    """What an exception means for a row."""
    if is_out_of_memory(error):
        return "oom"
    return "skipped" if could_not_compile(error) else "failed"


def reason_of(error: Exception) -> str:
    """Class, first line, and the innermost line of code, which is where a reader starts."""
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {first_line}{place}"
