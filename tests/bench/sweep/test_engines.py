import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.machine.process import Ending, Processes
from resblock_bench.bench.measure import jobs
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.sweep.engines import Lane


class Scripted(Processes):
    """Answers the truth with success and the cell with a given ending."""

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = ending
        self.environments: list[dict[str, str]] = []

    def run(self, function, argument, *, limit_s=None, environment=None):  # type: ignore
        self.environments.append(environment)
        if function is jobs.compute_site_truth:
            reply = msgspec.json.encode(jobs.TruthReply("ok"))
            return Ending(reply, 0, "truth", "", 0.1)
        return self.ending


def row_after(ending: Ending, task: Task, folder: Path, gpu: str | None = None):  # type: ignore
    processes = Scripted(ending)
    row = Lane(processes, folder, limit_s=60, gpu=gpu).measure(task)
    return row, processes


@pytest.mark.parametrize("reply", [b"", b"{}", b"garbage", b'{"schema_version": 1}'])
def test_a_reply_that_is_no_row_is_a_failed_cell(
    make_task: Callable[..., Task], tmp_path: Path, reply: bytes
) -> None:
    row, _ = row_after(Ending(reply, 0, "timing", "", 1.0), make_task(), tmp_path)
    assert row.status == "failed"
    assert "could not be used" in (row.reason or "")


@pytest.mark.parametrize("starved", [False, True])
def test_what_became_of_its_process_is_the_row_of_a_cell(
    make_task: Callable[..., Task], tmp_path: Path, starved: bool
) -> None:
    ending = Ending(None, -signal.SIGKILL, "memory", "last words", 1.0, starved)
    row, _ = row_after(ending, make_task(), tmp_path)
    assert (row.status, row.reason) == ending.problem()
    assert (row.output, row.wall_s) == ("last words", 1.0)


def test_a_lane_has_its_own_gpu_and_names_it(
    make_task: Callable[..., Task], tmp_path: Path
) -> None:
    ending = Ending(None, None, "timing", "", 60.0)
    task = make_task(device="cuda")
    row, processes = row_after(ending, task, tmp_path, gpu="GPU-bbbb-2")
    assert (row.status, row.device_uuid) == ("timeout", "bbbb-2")
    assert processes.environments == [{"CUDA_VISIBLE_DEVICES": "GPU-bbbb-2"}] * 2


def test_the_truth_of_the_newest_site_only_is_kept(
    make_task: Callable[..., Task], tmp_path: Path
) -> None:
    processes = Processes()
    made = Lane(processes, tmp_path, limit_s=60)
    try:
        for batch in (1, 1, 2):
            assert made.measure(make_task(batch=batch, mode="inference")).status == "ok"
            assert len(list(tmp_path.iterdir())) == 1
    finally:
        processes.close()


def test_a_truth_that_does_not_fit_is_out_of_memory(
    make_task: Callable[..., Task], tmp_path: Path
) -> None:
    """2^16 squared pixels are 1 PiB of input."""
    processes = Processes()
    try:
        task = make_task(resolution=2**16, batch=2**11, mode="inference")
        row = Lane(processes, tmp_path, limit_s=60).measure(task)
    finally:
        processes.close()
    assert row.status == "oom", row.reason
    assert "its float64 truth" in (row.reason or "")
