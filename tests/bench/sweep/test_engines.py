import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.machine.process import Ending, Processes
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import CellJob, Task
from resblock_bench.bench.records import Row
from resblock_bench.bench.sweep.engines import Lane


class Ended:
    """A process that says nothing, and has come to its end."""

    def __init__(self, ending: Ending) -> None:
        self.ending = ending

    def send(self, message: bytes) -> None:
        pass

    def receive(self, limit_s: float | None = None) -> bytes | None:
        return None

    def finish(self, limit_s: float | None = None) -> Ending:
        return self.ending

    def kill(self) -> None:
        pass


class Scripted(Processes):
    """Answers the truth with success and each cell with a given ending."""

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = ending
        self.environments: list[dict[str, str]] = []
        self.jobs: list[CellJob] = []

    def run(self, function, argument, *, limit_s=None, environment=None):  # type: ignore
        self.environments.append(environment)
        assert function is jobs.compute_site_truths
        return Ending(msgspec.json.encode(jobs.TruthReply("ok")), 0, "truth", "", 0.1)

    def start(self, function, argument, *, environment=None):  # type: ignore
        self.environments.append(environment)
        assert function is jobs.measure_cell
        self.jobs.append(msgspec.json.decode(argument, type=CellJob))
        return Ended(self.ending)


def rows_after(
    ending: Ending, block: list[Task], folder: Path, gpu: str | None = None
) -> tuple[list[Row], Scripted]:
    processes = Scripted(ending)
    return Lane(processes, folder, limit_s=60, gpu=gpu).measure(block), processes


@pytest.mark.parametrize("reply", [b"", b"{}", b"garbage", b'{"schema_version": 1}'])
def test_a_reply_that_is_no_row_is_a_failed_block(
    make_task: Callable[..., Task], tmp_path: Path, reply: bytes
) -> None:
    block = [make_task(), make_task(impl="fused")]
    rows, _ = rows_after(Ending(reply, 0, "timing", "", 1.0), block, tmp_path)
    assert [(row.axes, row.status) for row in rows] == [(task.cell, "failed") for task in block]
    assert "could not be used" in (rows[0].reason or "")


@pytest.mark.parametrize("starved", [False, True])
def test_what_became_of_its_process_is_the_row_of_a_cell(
    make_task: Callable[..., Task], tmp_path: Path, starved: bool
) -> None:
    ending = Ending(None, -signal.SIGKILL, "memory", "last words", 1.0, starved)
    (row,), _ = rows_after(ending, [make_task()], tmp_path)
    assert (row.status, row.reason) == ending.problem()
    assert row.output == "last words"


def test_a_lane_has_its_own_gpu_and_names_it(
    make_task: Callable[..., Task], tmp_path: Path
) -> None:
    ending = Ending(None, None, "timing", "", 60.0)
    block = [make_task(device="cuda"), make_task(device="cuda", impl="fused")]
    rows, processes = rows_after(ending, block, tmp_path, gpu="GPU-bbbb-2")
    assert [(row.status, row.device_uuid) for row in rows] == [("timeout", "bbbb-2")] * 2
    assert processes.environments == [{"CUDA_VISIBLE_DEVICES": "GPU-bbbb-2"}] * 3


def test_a_cell_on_a_cpu_may_allocate_what_is_free_or_was_asked_for(
    make_task: Callable[..., Task], tmp_path: Path
) -> None:
    ending = Ending(None, None, "timing", "", 60.0)
    block = [make_task(), make_task(impl="fused", memory_limit_bytes=12345)]
    _, processes = rows_after(ending, block, tmp_path)
    free, asked = (job.task.memory_limit_bytes for job in processes.jobs)
    assert (free or 0) > 2**20
    assert asked == 12345


def test_truths_are_kept_no_longer_than_their_block(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take gigabytes."""

    def run(processes, function, argument, **options):  # type: ignore[no-untyped-def]
        folder = Path(msgspec.json.decode(argument, type=CellJob).truths)
        folder.mkdir()
        (folder / "first.npz").write_bytes(b"gigabytes")
        return Ending(msgspec.json.encode(jobs.TruthReply("ok")), 0, "truth", "", 0.1)

    monkeypatch.setattr(Scripted, "run", run)
    for ending in (Ending(b"garbage", 0), Ending(None, -11)):
        rows_after(ending, [make_task()], tmp_path)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_truth_that_does_not_fit_is_out_of_memory(
    make_task: Callable[..., Task], tmp_path: Path
) -> None:
    """2^16 squared pixels are 1 PiB of input."""
    processes = Processes()
    try:
        task = make_task(resolution=2**16, batch=2**11, mode="inference")
        fused = msgspec.structs.replace(task.cell, impl="fused")
        block = [task, msgspec.structs.replace(task, cell=fused)]
        rows = Lane(processes, tmp_path, limit_s=60).measure(block)
    finally:
        processes.close()
    assert [row.status for row in rows] == ["oom"] * 2, rows[0].reason
    assert "its float64 truth" in (rows[0].reason or "")
    assert list(tmp_path.iterdir()) == []
