"""The allocator's history, driven by a fake torch.cuda.memory: what is called when."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resblock_bench.bench.measure.snapshot import dump, recording

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def record(enabled: str | None = "all", **options: object) -> None:
        if enabled is None:
            calls.append("off")
        else:
            assert options["stacks"] == "python"
            assert isinstance(options["max_entries"], int)
            calls.append("on")

    def write(filename: str) -> None:
        calls.append("dump")
        Path(filename).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", write)
    return calls


def test_pytorch_has_what_the_fakes_stand_for() -> None:
    impl: Callable[..., object] = torch.cuda.memory._record_memory_history_impl
    assert {"enabled", "stacks", "max_entries"} <= set(inspect.signature(impl).parameters)
    dumping: Callable[..., object] = torch.cuda.memory._dump_snapshot
    assert next(iter(inspect.signature(dumping).parameters)) == "filename"


def test_a_cell_that_fits_leaves_no_file(happened: list[str], tmp_path: Path) -> None:
    with recording(GPU, tmp_path / "cell.pickle"):
        happened.append("work")
    assert happened == ["on", "work", "off"]
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_is_dumped_before_the_history_is_forgotten(
    happened: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "snapshots" / "cell.pickle"
    with pytest.raises(torch.OutOfMemoryError, match="full"), recording(GPU, path):
        raise torch.OutOfMemoryError("full")
    assert happened == ["on", "dump", "off"]
    assert path.read_bytes() == b"snapshot"
    assert [file.name for file in path.parent.iterdir()] == ["cell.pickle"]


def test_another_error_dumps_nothing_and_still_ends_the_recording(
    happened: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="other"), recording(GPU, tmp_path / "cell.pickle"):
        raise ValueError("other")
    assert happened == ["on", "off"]


def test_a_cpu_has_no_snapshot(happened: list[str], tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), recording(CPU, tmp_path / "cell.pickle"):
        raise torch.OutOfMemoryError("full")
    assert happened == []
    assert list(tmp_path.iterdir()) == []


def test_a_dump_that_fails_leaves_nothing_and_raises_nothing(
    happened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(filename: str) -> None:
        Path(filename).write_bytes(b"snap")
        raise OSError(28, "No space left on device")

    path = tmp_path / "cell.pickle"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", half)
    with pytest.raises(torch.OutOfMemoryError, match="full"), recording(GPU, path):
        raise torch.OutOfMemoryError("full")
    assert dump(path) is None
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_raises_nothing(happened: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert dump(tmp_path / "file" / "cell.pickle") is None
    assert dump(tmp_path / "cell.pickle") == tmp_path / "cell.pickle"


def test_a_snapshot_is_written_through_no_link(happened: list[str], tmp_path: Path) -> None:
    theirs, folder = tmp_path / "theirs", tmp_path / "snapshots"
    folder.mkdir()
    for name in ("cell.pickle", "cell.pickle.part"):
        (folder / name).symlink_to(theirs)
    assert dump(folder / "cell.pickle") == folder / "cell.pickle"
    assert not theirs.exists()
    assert not (folder / "cell.pickle").is_symlink()
    (tmp_path / "link").symlink_to(folder)
    assert dump(tmp_path / "link" / "other.pickle") is None
    assert not (folder / "other.pickle").exists()
