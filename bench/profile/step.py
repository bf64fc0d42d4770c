"""Profiles the step of a cell, in the cell's own process: checked, timed plain, recorded, counted.

The step is recorded several times, and the one whose length is in the middle is kept whole. Then it
runs once more, slowly, to count what its operators do and to watch its storages.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from msgspec.structs import asdict
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import ProfilerActivity, profile

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.measure import snapshot
from resblock_bench.bench.measure.cell import (
    Task,
    checked_workload,
    id_of,
    reason_of,
    status_of,
)
from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.devices import Device, open_device
from resblock_bench.bench.measure.implementations import compiles
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.measure.telemetry import open_probe
from resblock_bench.bench.measure.workload import Workload
from resblock_bench.bench.records import Correctness, Status
from resblock_bench.bench.terminal import visible

from . import trace
from .events import MODULE, STEP, WORK, Event, events_of, mark, slices_of, spans_of
from .groups import group_of
from .memory import memory_use
from .profiles import (
    PROFILE_VERSION,
    PROTON,
    SNAPSHOT,
    TRACE,
    KernelTime,
    MemoryUse,
    OperatorWork,
    Profile,
    ProfilePart,
    summed,
)
from .work import WorkWatch

STEPS, STEPS_S = 5, 10.0
"""So many steps are timed, and as many recorded, but no more are begun after so long."""
_WARM_UP = 2
_SNAPSHOT_ENTRIES = 1_000_000
T = TypeVar("T")


class ProfileJob(msgspec.Struct, kw_only=True):
    """A cell to profile.

    truth      the file of its site's truth
    cpus       that the process computes on; none are those it has
    alone      whether nobody takes turns with it
    snapshot   also for PyTorch's memory viewer
    """

    task: Task
    truth: str
    folder: str
    cpus: list[int]
    alone: bool
    snapshot: bool = False


class ProfileReply(msgspec.Struct, kw_only=True):
    """A profile, or the status of a row and the reason why there is none."""

    status: Status
    reason: str | None = None
    profile: Profile | None = None


def profile_cell(argument: bytes, channel: Channel) -> bytes:
    """ProfileJob -> ProfileReply; writes the trace."""
    job = msgspec.json.decode(argument, type=ProfileJob)
    try:
        reply = _profiled(job, channel)
    except UsageError as error:  # what cannot be written
        reply = ProfileReply(status="failed", reason=str(error))
    except Exception as error:
        reply = ProfileReply(status=status_of(error), reason=reason_of(error))
    return msgspec.json.encode(reply)


def _profiled(job: ProfileJob, channel: Channel) -> ProfileReply:
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    device = open_device(job.task.device, job.task.environment.threads)
    channel.announce("check")
    checked = checked_workload(job.task, Path(job.truth), device)
    if checked.verdict.status != "ok":
        return ProfileReply(status="wrong", reason=checked.verdict.reason)
    channel.announce("profile")
    workload, notes = checked.workload, []
    folder = Path(job.folder)
    if job.snapshot:
        notes += _snapshot(workload, device, folder / SNAPSHOT)
    recorded, disturbances = _watched(workload, device, channel)
    notes += disturbances if job.alone else ()  # others that take turns are no disturbance
    counted = None
    if compiles(job.task.cell.impl):
        notes.append("torch.compile steps aside for whoever counts operators: bytes are unknown")
    else:
        channel.announce("count")
        counted = counted_step(workload, device)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in workload.resident()}
    left_out = trace.write(folder / TRACE, recorded.events, sum(held.values()))
    found = profile_of(job.task, checked.verdict.correctness, recorded, counted, left_out, notes)
    return ProfileReply(status="ok", profile=found)


def _watched(workload: Workload, device: Device, channel: Channel) -> tuple["Recorded", list[str]]:
    """What was recorded, and why its times should not be trusted."""

    def turn() -> None:
        channel.send(b"ready")
        channel.receive()

    probe = open_probe(device.kind, device.uuid)
    try:
        before = probe.read()
        recorded = recorded_step(workload, device, turn)
        threads = torch.get_num_threads()
        gone = conditions(before, probe.read(), source=probe.source, images=0, threads=threads)
    finally:
        probe.close()
    return recorded, [f"disturbed: {one}" for one in gone.disturbances]


def profile_of(
    task: Task,
    correctness: Correctness,
    recorded: "Recorded",
    counted: "Work | None",
    left_out: int,
    notes: list[str],
) -> Profile:
    """What was found, put together."""
    slices, environment = slices_of(recorded.events), task.environment
    parts, kernels = list(counted.parts if counted else ()), []
    for one in slices:
        own: dict[str, Any] = {"stage": one.stage, "group": one.group, "ns": one.ns}
        parts.append(ProfilePart(module=one.module, launches=int(one.name is not None), **own))
        if one.name is not None:
            kernels.append(KernelTime(name=one.name, launches=1, **own))
    return Profile(
        profile_version=PROFILE_VERSION,
        id=id_of(task),
        cell=task.cell,
        device=task.device,
        device_name=(environment.gpu if task.device == "cuda" else environment.cpu) or "CPU",
        threads=environment.threads,
        seed=task.seed,
        versions=environment.versions,
        commit=environment.commit,
        dirty=environment.dirty,
        started_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        correctness=correctness,
        ceilings=environment.ceilings,
        step_ns=sum(one.ns for one in slices),
        profiled_ns=recorded.all_ns,
        plain_ns=recorded.plain_ns,
        parts=summed(parts),
        kernels=sorted(summed(kernels), key=lambda one: -one.ns),
        operators=counted.operators if counted else [],
        memory=counted.memory if counted else None,
        left_out=left_out,
        notes=notes,
    )


@dataclass
class Recorded:
    """The events of the step in the middle, and how long all of them took."""

    events: list[Event]
    all_ns: list[int]
    plain_ns: list[int]


def recorded_step(workload: Workload, device: Device, turn: Callable[[], object]) -> Recorded:
    """Time the step without a profiler, and then with one; `turn` waits until others have had
    theirs."""
    for _ in range(_WARM_UP):
        _run(workload, device)
    plain = list(_several(lambda: _run(workload, device), turn))
    steps = sorted(_several(lambda: _events(workload, device), turn), key=_step_ns)
    all_ns = list(map(_step_ns, steps))
    return Recorded(steps[(len(steps) - 1) // 2], all_ns, plain)


def _several(action: Callable[[], T], turn: Callable[[], object]) -> Iterator[T]:
    taken_s = 0.0
    for _ in range(STEPS):
        turn()
        began = time.monotonic()
        yield action()
        taken_s += time.monotonic() - began
        if taken_s > STEPS_S:
            return


def _run(workload: Workload, device: Device) -> int:
    """A step from its beginning to the end of all that it has launched: nanoseconds."""
    workload.freshen()
    _wait(device)
    began = time.perf_counter_ns()
    with mark(STEP):
        results = workload.step()
        _wait(device)
    taken = time.perf_counter_ns() - began
    del results
    return max(1, taken)


def _wait(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize(device.torch_device)


def _events(workload: Workload, device: Device) -> list[Event]:
    """What the profiler records of a step."""
    activities = [ProfilerActivity.CPU]
    if device.kind == "cuda":
        activities.append(ProfilerActivity.CUDA)
    marks = not compiles(workload.cell.impl)  # by hooks, for which it would compile again
    with (
        _followed(workload.block, marks),
        profile(activities=activities, profile_memory=True) as profiler,
    ):
        _run(workload, device)
    return events_of(profiler, device.kind)


@contextlib.contextmanager
def _followed(model: nn.Module, marks: bool = True) -> Iterator[None]:
    """With the backward in this thread, so that all of autograd's numbers are of one count."""
    marked = marked_modules(model) if marks else contextlib.nullcontext()
    with torch.autograd.set_multithreading_enabled(False), marked:
        yield


@contextlib.contextmanager
def marked_modules(model: nn.Module) -> Iterator[None]:
    """Within the context every call of a module of the model is marked in what is recorded."""
    names = {module: visible(name) for name, module in model.named_modules()}
    running: list[contextlib.AbstractContextManager[Any]] = []

    def begin(module: nn.Module, inputs: object) -> None:
        # One that has no name here is a part of what calls it.
        name = names.get(module)
        running.append(contextlib.nullcontext() if name is None else mark(f"{MODULE}{name}"))
        running[-1].__enter__()

    def end(module: nn.Module, inputs: object, output: object) -> None:
        running.pop().__exit__(None, None, None)

    # Also of a module that a checkpoint leaves once it has all that it has to compute again.
    handles = (
        register_module_forward_pre_hook(begin),
        register_module_forward_hook(end, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _step_ns(events: list[Event]) -> int:
    return next(one.end - one.start for one in events if one.name == STEP)


def _snapshot(workload: Workload, device: Device, path: Path) -> list[str]:
    """Write the allocator's history of a step; returns a sentence where that failed."""
    torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES, stacks="python")
    try:
        _run(workload, device)
        written = snapshot.dump(path)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return [] if written is not None else [f"{SNAPSHOT} could not be written"]


def proton_cell(argument: bytes, channel: Channel) -> bytes:
    """ProfileJob -> ProfileReply: the step once more under Triton's profiler, which shares no
    process with PyTorch's."""
    job = msgspec.json.decode(argument, type=ProfileJob)
    try:
        device = open_device(job.task.device, job.task.environment.threads)
        workload = KINDS[job.task.cell.workload].drawn(
            job.task.cell, device.torch_device, job.task.seed
        )
        import triton.profiler as proton

        for _ in range(_WARM_UP):
            _run(workload, device)
        proton.start(str(Path(job.folder) / PROTON), hook="triton")
        _run(workload, device)
        proton.finalize()
        reply = ProfileReply(status="ok")
    except Exception as error:
        reply = ProfileReply(status="failed", reason=reason_of(error))
    return msgspec.json.encode(reply)


@dataclass
class Work:
    """What the operators of a step do, by module, pass and group, and its memory."""

    parts: list[ProfilePart]
    operators: list[OperatorWork]
    memory: MemoryUse


def counted_step(workload: Workload, device: Device) -> Work:
    """Run the step once more, counting."""
    workload.freshen()
    watch = WorkWatch(workload.resident())
    with _followed(workload.block), profile(activities=[ProfilerActivity.CPU]) as profiler, watch:
        with mark(STEP):
            results = workload.step()
        del results
    spans = spans_of(events_of(profiler, "cpu"))
    marks = {one.event.name: one for one in spans if one.event.name.startswith(WORK)}
    places = [marks[f"{WORK}{position}"] for position in range(len(watch.operations))]
    memory = memory_use(watch, workload, places)
    workload.reset()
    parts, operators = [], []
    for done, span in zip(watch.operations, places, strict=True):
        group = group_of(done.name, span.within) or "elementwise"
        own = {"stage": span.stage, "group": group, **asdict(done)}
        operators.append(OperatorWork(calls=1, **own))
        del own["name"]
        parts.append(ProfilePart(module=span.module, **own))
    return Work(parts, summed(operators), memory)
