"""What a profiler recorded of a step, and to which module, pass and group each part belongs.

Every event of the step's thread lies within another one, so what it took itself is its length less
that of those within it, and all of these add up to the step. On a GPU the step is made of kernels
and of what lies between them; each belongs to the operator that launched it.

An operator of the forward belongs to the module whose call is around it. Autograd numbers the
nodes of its graph as operators make them, and the profiler notes the next number with every
operator: so the last operator with a number has made that node, wherever and whenever it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .groups import Group, group_of

StepStage = Literal["forward", "recompute", "backward", "update"]
"""recompute: what checkpoints compute again in the backward; update: all that comes after it."""

STEP, MODULE, WORK = "resblock-bench step", "resblock-bench module ", "resblock-bench work "
"""How the names of our own marks begin."""
_NODE = "autograd::engine::evaluate_function: "
_LAUNCH = re.compile(r"(cuda|cu|hip)[A-Z]")


@dataclass(frozen=True, slots=True)
class Event:
    """What the profiler has recorded; times in nanoseconds.

    sequence      the number that autograd gave, or would give next; -1 for none
    correlation   by which a kernel and its launch know each other; of an operator its own
    cause         of a kernel: the operator that launched it; 0 for none
    bytes         of a change of the memory
    """

    name: str
    start: int
    end: int
    sequence: int = -1
    thread: int = 0
    kernel: bool = False
    stream: int = 0
    correlation: int = 0
    cause: int = 0
    bytes: int = 0

    @property
    def is_launch(self) -> bool:
        return not self.kernel and _LAUNCH.match(self.name) is not None


def events_of(profiler: torch.profiler.profile, device: str) -> list[Event]:
    """What was recorded, in the order of time; of the memory that of the device."""
    found = []
    for event in _recorded(profiler):
        kernel = event.device_type() != torch._C._autograd.DeviceType.CPU
        name, memory = event.name(), event.name() == "[memory]"
        if memory and kernel != (device == "cuda"):
            continue
        if kernel and (event.is_user_annotation() or name.startswith("resblock-bench ")):
            continue  # our marks once more, on the device's timeline
        found.append(
            Event(
                name=name,
                start=event.start_ns(),
                end=event.start_ns() + event.duration_ns(),
                sequence=event.sequence_nr(),
                thread=event.start_thread_id(),
                kernel=kernel and not memory,
                stream=event.device_resource_id() if kernel else 0,
                correlation=event.correlation_id(),
                cause=event.linked_correlation_id(),
                bytes=event.nbytes() if memory else 0,
            )
        )
    return sorted(found, key=lambda one: (one.start, -one.end, one.correlation))


def mark(name: str) -> AbstractContextManager[Any]:
    """A mark in what is recorded around the block. No operator, which a dispatch mode would see."""
    made: AbstractContextManager[Any] = torch._C._profiler._RecordFunctionFast(name)
    return made


def _recorded(profiler: Any) -> Iterable[Any]:
    return profiler.profiler.kineto_results.events()  # type: ignore[no-any-return]


@dataclass(slots=True)
class Placed:
    """An event with where it lies and what it belongs to.

    module     by its name, "" for the whole; None outside of any
    within     the group of an operator and of what it calls
    operator   whether it computes, and is not our mark, a node of autograd, or Python
    """

    event: Event
    start: int
    end: int
    parent: Placed | None
    inner: list[Placed] = field(default_factory=list)
    module: str | None = None
    stage: StepStage = "forward"
    within: Group | None = None
    operator: bool = False

    @property
    def group(self) -> Group:
        """Of the time that the event itself takes."""
        if not self.operator:
            return "compiled" if self.within == "compiled" else "gaps"
        return self.within or "elementwise"

    @property
    def own_ns(self) -> int:
        return self.end - self.start - sum(one.end - one.start for one in self.inner)


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a step's time, and what it belongs to. `name` is None where no operator or kernel
    ran."""

    name: str | None
    module: str | None
    stage: StepStage
    group: Group
    ns: int


def spans_of(events: Sequence[Event]) -> list[Placed]:
    """The spans of a step, the step first, in the order of time; each within its parent."""
    step = next(one for one in events if one.name == STEP)
    found: list[Placed] = []
    open_: list[Placed] = []
    for event in events:
        own_thread = event.thread == step.thread or event.is_launch
        if event.kernel or event.name == "[memory]" or not own_thread:
            continue
        if not step.start <= event.start < step.end:
            continue
        while open_ and open_[-1].end <= event.start:
            open_.pop()
        parent = open_[-1] if open_ else None
        end = event.end if parent is None else min(event.end, parent.end)
        span = Placed(event, event.start, end, parent)
        if parent is not None:
            parent.inner.append(span)
        found.append(span)
        open_.append(span)
    _attribute(found)
    return found


def _attribute(spans: Sequence[Placed]) -> None:
    """Say of each span, in the order of time, what it belongs to."""
    makers: dict[int, str | None] = {}  # by number, the module that made a node
    callers: dict[str, str | None] = {}  # of each module the one that called it in the forward
    node: str | None = None
    last = max((one.end for one in spans if one.event.name.startswith(_NODE)), default=None)
    for span in spans[1:]:
        event, parent = span.event, span.parent
        assert parent is not None
        span.module, span.stage, span.within = parent.module, parent.stage, parent.within
        if event.name.startswith(MODULE):
            span.module, span.within = event.name.removeprefix(MODULE), None
            if parent.stage in ("backward", "recompute"):
                span.stage = "recompute"
            else:
                callers.setdefault(span.module, parent.module)
        elif event.name.startswith(_NODE):
            # Gradients are accumulated right after the node that has computed them.
            node = makers.get(event.sequence, node if event.sequence < 0 else None)
            span.module, span.stage, span.within = node, "backward", None
        else:
            span.within = group_of(event.name, parent.within)
            span.operator = "::" in event.name and "autograd::" not in event.name
            if parent.parent is None and last is not None and span.start >= last:
                span.stage = "update"
            if event.sequence < 0 or parent.event.name == _NODE + event.name:
                continue
            if span.stage == "backward":
                # Only what is computed again is recorded by autograd meanwhile.
                span.stage, span.module = "recompute", _recomputed(span, callers)
            makers[event.sequence] = span.module


def _recomputed(span: Placed, callers: dict[str, str | None]) -> str | None:
    """The module that is computed again around an operator which lies in none: it calls those that
    the same node computes again."""
    around = span.parent
    while around is not None and not around.event.name.startswith(_NODE):
        around = around.parent
    called = [] if around is None else _modules_within(around)
    return next((callers.get(one, span.module) for one in called), span.module)


def _modules_within(span: Placed) -> Iterator[str]:
    for one in span.inner:
        if one.event.name.startswith(MODULE):
            yield one.event.name.removeprefix(MODULE)
        elif not one.event.name.startswith(_NODE):
            yield from _modules_within(one)


def slices_of(events: Sequence[Event]) -> list[Slice]:
    """The parts of a step, whose times add up to it."""
    spans = spans_of(events)
    kernels = [one for one in events if one.kernel]
    return list(_of_kernels(kernels, spans) if kernels else _of_operators(spans))


def _of_operators(spans: Sequence[Placed]) -> Iterator[Slice]:
    for span in spans:
        name = None if span.group == "gaps" else span.event.name
        yield Slice(name, span.module, span.stage, span.group, span.own_ns)


def _of_kernels(kernels: Sequence[Event], spans: Sequence[Placed]) -> Iterator[Slice]:
    """Kernels one after the other, each with the idle time before it; where two overlap, the first
    has the time that they share."""
    step, launcher_of = spans[0], launchers(spans)
    now = step.start
    for kernel in sorted(kernels, key=lambda one: one.start):
        if not step.start <= kernel.start < step.end:
            continue
        span, begin = launcher_of(kernel), max(now, kernel.start)
        if begin > now:
            yield Slice(None, span.module, span.stage, "gaps", begin - now)
        now = min(max(now, kernel.end), step.end)
        group = span.within or group_of(kernel.name, None) or "elementwise"
        yield Slice(kernel.name, span.module, span.stage, group, now - begin)
    yield Slice(None, None, "update", "gaps", step.end - now)


def launchers(spans: Sequence[Placed]) -> Callable[[Event], Placed]:
    """Says of a kernel what launched it; the step of one of which that is not known."""
    launches = {one.event.correlation: one for one in spans if one.event.is_launch}
    operators = {one.event.correlation: one for one in spans if not one.event.is_launch}

    def launcher(kernel: Event) -> Placed:
        launch = launches.get(kernel.correlation)
        operator = operators.get(kernel.cause) if kernel.cause else None
        return operator or (launch and launch.parent) or spans[0]

    return launcher
