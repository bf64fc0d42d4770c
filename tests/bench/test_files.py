"""One writer for all files, and one check beforehand."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")
    with files.whole(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_nothing_half_written_is_left_of_what_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")

    def fail() -> None:
        with files.whole(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError) as raised:
        files.write(path, b"after", "free some space")
    assert str(raised.value) == (
        f"{path} cannot be written (No space left on device): free some space"
    )
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with files.whole(path, durable=False) as file:
        file.write(b"after")
    assert path.read_text() == "after"


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "below" / "x.json", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    files.write(link, b"content", "")
    assert link.is_symlink()
    assert target.read_bytes() == b"content"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    # Nobody reads yet: neither the check nor its end may wait for a reader, or be taken for one.
    files.check_writable(path)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    files.write(path, b"content", "")
    reader.join(60)
    assert found == [b"content"]
    assert path.is_fifo()


def test_the_standard_output_is_continued_where_it_is_a_file(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from resblock_bench.bench import files\n"
        "print('table', flush=True)\n"
        "files.check_writable(Path('/dev/stdout'))\n"
        "files.write(Path('/dev/stdout'), b'json\\n', '')\n"
    )
    path = tmp_path / "out"
    with path.open("ab") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert path.read_text() == "table\njson\n"


def test_what_a_path_holds_is_left_by_the_check(tmp_path: Path) -> None:
    path = tmp_path / "here" / "x.json"
    with pytest.raises(FileNotFoundError):
        files.check_writable(path)
    files.check_writable(path, parents=True)
    assert not list(tmp_path.iterdir())
    path.parent.mkdir()
    path.write_text("before")
    files.check_writable(path)
    assert path.read_text() == "before"
    with pytest.raises(IsADirectoryError):
        files.check_writable(path.parent)
    with pytest.raises(NotADirectoryError):
        files.check_writable(path / "below")


def test_the_check_looks_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.TemporaryFile

    def small(**arguments: object) -> object:
        file = real(**arguments)  # type: ignore[call-overload]
        monkeypatch.setattr(file, "write", full, raising=False)
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", small)
    with pytest.raises(OSError, match="No space left"):
        files.check_writable(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
