"""The trace of a step, as Perfetto and Chrome open it: JSON, gzipped, of a bounded size.

Operators and kernels have a track each, with module, pass and group of every event; the memory is
a counter beside them. Format: "Trace Event Format" of Chromium. Numbers are finite, and all that
others named is a JSON string.
"""

import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.units import MIB

from .events import MODULE, Event, Placed, launchers, spans_of

MOST_BYTES = 10 * 10**6
"""Of the file, so that Perfetto opens it at once."""
_LEAST = 1000
"""Nanoseconds and bytes, that all the smaller ones go first of."""
ADVICE = "name another folder with --output"


def write(path: Path, events: Sequence[Event], held_bytes: int) -> int:
    """Write the trace of a step, `held_bytes` alive when it begins; how much of it is left out.

    Where all is too much the shortest events go, and the smallest changes of the memory. Raises
    UsageError where it cannot be written.
    """
    found = list(_weighed(events, held_bytes))
    least = 0
    while True:
        kept = [one for weight, one in found if weight >= least]
        data = gzip.compress(msgspec.json.encode({"traceEvents": kept}), mtime=0)
        if len(data) <= MOST_BYTES:
            break
        least = max(_LEAST, 4 * least)
    files.write(path, data, ADVICE)
    return len(found) - len(kept)


def _weighed(events: Sequence[Event], held_bytes: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """What stands in the trace, each with its nanoseconds or its bytes.

    Times are in microseconds since the beginning of the step.
    """
    spans = spans_of(events)
    step, launcher_of = spans[0], launchers(spans)
    streams = {one.stream: f"kernels of stream {one.stream}" for one in events if one.kernel}
    for track, name in {-1: "operators", **streams}.items():
        named = {"ph": "M", "pid": 1, "tid": track + 2, "name": "thread_name"}
        yield math.inf, {**named, "args": {"name": name}}

    def slice_(one: Event | Placed, name: str, track: int) -> dict[str, Any]:
        times = {"ts": (one.start - step.start) / 1000, "dur": (one.end - one.start) / 1000}
        return {"name": name, "ph": "X", "pid": 1, "tid": track + 2, **times}

    for span in spans:
        name = span.event.name
        if name.startswith(MODULE):
            name = name.removeprefix(MODULE) or "the whole"
        belongs = {"module": span.module, "pass": span.stage}
        shown = {**slice_(span, name, -1), "cat": span.group, "args": belongs}
        yield span.end - span.start, shown
    for event in events:
        if event.kernel:
            by = launcher_of(event)
            belongs = {"module": by.module, "pass": by.stage, "operator": by.event.name}
            shown = {**slice_(event, event.name, event.stream), "args": belongs}
            yield event.end - event.start, {**shown, "cat": by.within or "kernel"}
        elif event.name == "[memory]" and step.start <= event.start <= step.end:
            held_bytes += event.bytes
            moment = {"ts": (event.start - step.start) / 1000}
            counter = {"ph": "C", "pid": 1, "name": "memory", **moment}
            yield abs(event.bytes), {**counter, "args": {"MiB": round(held_bytes / MIB, 3)}}
