"""The trace as Perfetto reads it."""

import gzip
import json
from pathlib import Path

import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.profile import trace
from resblock_bench.bench.profile.events import MODULE, STEP, Event

HOSTILE = '<script>"\x1b[31m\u2028</script>'
EVENTS = [
    Event(STEP, 1000, 9000),
    Event(f"{MODULE}", 1000, 5000),
    Event(f"{MODULE}{HOSTILE}", 1500, 4000),
    Event("aten::conv2d", 2000, 3000, correlation=4),
    Event("[memory]", 2500, 2500, bytes=2**20),
    Event("cudaLaunchKernel", 2600, 2700, correlation=8),
    Event("[memory]", 4500, 4500, bytes=-(2**20)),
    Event("a_kernel", 5000, 8000, kernel=True, correlation=8, cause=4),
    Event("[memory]", 9500, 9500, bytes=7),
]


def refused(word: str) -> None:
    raise ValueError(word)


def read(path: Path) -> list[dict]:
    text = gzip.decompress(path.read_bytes()).decode()
    return json.loads(text, parse_constant=refused)["traceEvents"]


def written(tmp_path: Path, events: list[Event] = EVENTS) -> list[dict]:
    assert trace.write(tmp_path / "trace.json.gz", events, 3 * 2**20) == 0
    return read(tmp_path / "trace.json.gz")


def test_every_event_is_on_its_track_with_what_it_belongs_to(tmp_path: Path) -> None:
    found = {one["name"]: one for one in written(tmp_path) if one["ph"] == "X"}
    assert (found["aten::conv2d"]["ts"], found["aten::conv2d"]["dur"]) == (1.0, 1.0)
    assert found["aten::conv2d"]["cat"] == found["a_kernel"]["cat"] == "convolution"
    kernel = found["a_kernel"]
    assert kernel["args"]["operator"] == "aten::conv2d"
    assert kernel["args"]["pass"] == "forward"
    assert kernel["args"]["module"] == found["aten::conv2d"]["args"]["module"]
    assert kernel["tid"] != found["aten::conv2d"]["tid"]
    assert {"the whole", STEP} < found.keys()
    assert {one["tid"] for one in written(tmp_path) if one["ph"] == "M"} == {1, 2}


def test_the_memory_is_a_counter_in_the_same_trace(tmp_path: Path) -> None:
    counts = [one for one in written(tmp_path) if one["ph"] == "C"]
    assert [(one["ts"], one["args"]["MiB"]) for one in counts] == [(1.5, 4.0), (3.5, 3.0)]


def test_hostile_names_are_strings(tmp_path: Path) -> None:
    names = [one["name"] for one in written(tmp_path)]
    assert any("<script>" in name and "\x1b" in name for name in names)


def test_a_trace_has_a_limit_and_the_shortest_events_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Event(f"op {n}", 2 * n + 2, 2 * n + 3) for n in range(5000)]
    events = [Event(STEP, 0, 10**6), *many, Event("long", 20_000, 900_000)]
    monkeypatch.setattr(trace, "MOST_BYTES", 2000)
    assert trace.write(tmp_path / "trace.json.gz", events, 0) == 5000
    assert (tmp_path / "trace.json.gz").stat().st_size <= 2000
    assert {"long", STEP} <= {one["name"] for one in read(tmp_path / "trace.json.gz")}


def test_a_trace_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent.* cannot be written .*--output"):
        trace.write(tmp_path / "absent" / "trace.json.gz", EVENTS, 0)
