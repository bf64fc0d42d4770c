"""One cell in, one row out: checked, then measured, whatever happens on the way."""

import datetime
import gc
import platform
import statistics
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resblock_bench.bench import stats
from resblock_bench.bench.correctness import TruthStore, check, checked_cell
from resblock_bench.bench.devices import Device, forget_cell
from resblock_bench.bench.fingerprint import code_fingerprint
from resblock_bench.bench.grid import PlannedCell
from resblock_bench.bench.implementations import IMPLEMENTATIONS, could_not_compile
from resblock_bench.bench.records import (
    SCHEMA_VERSION,
    Cell,
    Contract,
    Environment,
    Row,
    cell_id,
)
from resblock_bench.bench.timing import Rule, Timing, time_fn
from resblock_bench.bench.workload import (
    INPUTS,
    PRECISION,
    STEPS,
    Workload,
    draw_inputs,
    draw_weights,
    unsupported,
)


@dataclass
class Session:
    """What the cells of one run share."""

    device: Device
    environment: Environment
    rule: Rule
    seed: int
    truths: TruthStore = field(init=False)

    def __post_init__(self) -> None:
        self.truths = TruthStore(self.device.torch_device, self.seed)


def contract_of(cell: Cell, session: Session) -> Contract:
    """The conditions under which a cell of this session is timed."""
    rule, timer = session.rule, session.device.timer
    return Contract(
        device=session.device.kind,
        timer=timer.name,
        threads=session.environment.threads,
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
        l2=timer.l2,
        backend=session.device.backend,
        seed=session.seed,
        step=STEPS[cell.mode],
        precision=PRECISION,
        inputs=INPUTS,
    )


def measure_cell(planned: PlannedCell, session: Session) -> Row:
    """The row of a cell. An exception becomes the row's status and reason; only interrupts pass."""
    cell = planned.cell
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    reason = unsupported(cell) or IMPLEMENTATIONS[cell.impl].unusable(session.device.kind)
    found: dict[str, Any]
    if reason is not None:
        found = {"status": "skipped", "reason": reason}
    else:
        try:
            found = _measured(cell, session)
        except Exception as error:
            found = {"status": _status(error), "reason": _reason(error)}
    gc.collect()
    forget_cell(session.device)
    contract = contract_of(cell, session)
    environment = session.environment
    return Row(
        **{
            **dict.fromkeys(Row.__struct_fields__),
            "schema_version": SCHEMA_VERSION,
            "id": cell_id(cell, contract, code_fingerprint()),
            "attempt": 1,
            "code": code_fingerprint(),
            "host": platform.node(),
            "axes": cell,
            "multiplicity": planned.multiplicity,
            "contract": contract,
            "device_name": session.device.name,
            "versions": environment.versions,
            "commit": environment.commit,
            "dirty": environment.dirty,
            "seed": session.seed,
            "started_at": started,
            **found,
        }
    )


def _measured(cell: Cell, session: Session) -> dict[str, Any]:
    device, seed = session.device, session.seed
    truth = session.truths.of(cell)
    weights = draw_weights(cell, seed)
    inputs = draw_inputs(cell, device.torch_device, seed)
    workload = Workload(checked_cell(cell), weights, inputs, device.torch_device)
    right, correctness = check(workload.results(), truth)
    if not right:
        worst = correctness.worst
        error, limit = correctness.errors[worst], correctness.limits[worst]
        return {
            "status": "wrong",
            "reason": f"{worst}: relative error {error} is above its limit {limit}",
            "correctness": correctness,
        }
    if cell.dropout:
        workload = Workload(cell, weights, inputs, device.torch_device)
    memory_note = device.meter.unusable(cell.impl)
    memory = device.meter.measure(workload) if memory_note is None else None
    torch.manual_seed(seed)  # the masks of dropout
    timing = time_fn(workload.step, device.timer, session.rule, prepare=workload.reset)
    return {
        "status": "ok",
        "correctness": correctness,
        "memory": memory,
        "memory_note": memory_note,
        **_timing_fields(timing, cell, session.rule),
    }


def _timing_fields(timing: Timing, cell: Cell, rule: Rule) -> dict[str, Any]:
    median_ms = statistics.median(timing.samples_ms)
    low, high = stats.median_interval(timing.samples_ms, rule.confidence) or (None, None)
    return {
        "samples_ms": timing.samples_ms,
        "median_ms": median_ms,
        "ci_low_ms": low,
        "ci_high_ms": high,
        "stop_rule": timing.stop_rule,
        "outliers": stats.outlier_count(timing.samples_ms),
        "warmup_steps": timing.warmup_steps,
        "warmup_s": timing.warmup_s,
        "warmup_steady": timing.warmup_steady,
        "bursts": timing.bursts,
        "throughput_images_per_s": cell.batch / median_ms * 1e3,
    }


def _status(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    # The CPU allocator has no exception class of its own.
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error):
        return "oom"
    return "skipped" if could_not_compile(error) else "failed"


def _reason(error: Exception) -> str:
    """Class, first line, and the innermost line of code, which is where a reader starts."""
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {first_line}{place}"
