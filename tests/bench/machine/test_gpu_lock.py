"""A GPU has one user, and the lock's file, in a folder of all users, is trusted with nothing."""

import os
import tempfile
from pathlib import Path

import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.gpu_lock import only_user

GPU = "GPU-0a1b"


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "resblock-bench-0a1b.lock"


def test_one_run_has_it_at_a_time(lock: Path) -> None:
    with only_user(GPU):
        assert lock.exists()
        with pytest.raises(UsageError, match="another run of this suite"), only_user(GPU):
            pass
    with only_user(GPU):
        pass


def test_no_file_is_made_through_a_link(lock: Path, tmp_path: Path) -> None:
    lock.symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="cannot be locked"), only_user(GPU):
        pass
    assert not (tmp_path / "theirs").exists()


def test_a_pipe_is_not_waited_for(lock: Path) -> None:
    os.mkfifo(lock)
    with only_user(GPU):
        pass
