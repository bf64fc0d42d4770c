"""The trace of a step, as Perfetto and Chrome open it: JSON, gzipped, of a bounded size.

Operators and kernels have a track each, with module, pass and group of every event; the memory is
a counter beside them. Format: "Trace Event Format" of Chromium. Numbers are finite, and all that
others named is a JSON string.
"""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from resblock_bench.bench import files

from .events import MODULE, STEP, Event, launchers, spans_of

MOST_BYTES = 10 * 10**6
"""Of the file, so that Perfetto opens it at once."""
_LEAST_NS = 1000
_OPERATORS, _KERNELS = 1, 2
ADVICE = "name another folder with --output"


def write(path: Path, events: Sequence[Event], held_bytes: int) -> int:
    """Write the trace of a step, `held_bytes` alive when it begins; how many events are left out.

    Where all of them are too many the shortest go. Raises UsageError where it cannot be written.
    """
    found = list(_trace_events(events, held_bytes))
    least = 0
    while True:
        kept = [one for one in found if one.get("dur", one["ts"]) * 1000 >= least]
        data = gzip.compress(msgspec.json.encode({"traceEvents": kept}), mtime=0)
        if len(data) <= MOST_BYTES:
            break
        least = max(_LEAST_NS, 4 * least)
    files.write(path, data, ADVICE)
    return len(found) - len(kept)


def _trace_events(events: Sequence[Event], held_bytes: int) -> Iterator[dict[str, Any]]:
    """Times in microseconds since the beginning of the step."""
    spans = spans_of(events)
    step = spans[0]
    for track, name in ((_OPERATORS, "operators"), (_KERNELS, "kernels")):
        yield {
            "ph": "M",
            "ts": 0,
            "pid": 1,
            "tid": track,
            "name": "thread_name",
            "args": {"name": name},
        }
    for span in spans:
        name = span.event.name
        if name.startswith(MODULE):
            name = name.removeprefix(MODULE) or "the whole"
        yield {
            **_slice(name, span.start, span.end, step.start, _OPERATORS),
            "cat": "step" if name == STEP else span.group,
            "args": {"module": span.module, "pass": span.stage},
        }
    launcher_of = launchers(spans)
    for event in events:
        if event.kernel:
            cause = launcher_of(event)
            yield {
                **_slice(event.name, event.start, event.end, step.start, _KERNELS),
                "cat": cause.within or "kernel",
                "args": {"module": cause.module, "pass": cause.stage, "operator": cause.event.name},
            }
        elif event.name == "[memory]" and step.start <= event.start <= step.end:
            held_bytes += event.bytes
            moment = (event.start - step.start) / 1000
            counter = {"ph": "C", "pid": 1, "name": "memory"}
            yield {**counter, "ts": moment, "args": {"MiB": round(held_bytes / 2**20, 3)}}


def _slice(name: str, start: int, end: int, begin: int, track: int) -> dict[str, Any]:
    times = {"ts": (start - begin) / 1000, "dur": (end - start) / 1000}
    return {"name": name, "ph": "X", "pid": 1, "tid": track, **times}
