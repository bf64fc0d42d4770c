"""One writer for all files, and one check beforehand."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from resblock_bench.bench import files
from resblock_bench.bench.errors import InvalidError, UsageError


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


def test_a_link_that_the_user_named_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "below" / "x.json", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    files.write(link, b"content", "", named=True)
    assert link.is_symlink()
    assert target.read_bytes() == b"content"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_that_lies_in_a_folder_is_replaced(tmp_path: Path, dangling: bool) -> None:
    target, link = tmp_path / "mine", tmp_path / "run" / "cells.csv"
    link.parent.mkdir()
    link.symlink_to(target)
    if not dangling:
        target.write_text("mine")
    files.check_writable(link)
    files.write(link, b"content", "")
    assert not link.is_symlink()
    assert link.read_bytes() == b"content"
    assert target.exists() is not dangling
    assert dangling or target.read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/full")])
def test_what_is_no_file_in_a_folder_is_replaced(tmp_path: Path, make: Callable) -> None:
    path = tmp_path / "front.png"
    make(path)
    files.check_writable(path)
    files.write(path, b"content", "")
    assert path.read_bytes() == b"content"
    assert path.lstat().st_mode == path.stat().st_mode


def test_what_the_user_did_not_name_never_takes_the_place_of_a_device() -> None:
    for path in ("/dev/no-such-device", "/proc/self/no-such-entry"):
        with pytest.raises(
            UsageError, match=f"{path} cannot be written .no file is kept there.: x"
        ):
            files.write(Path(path), b"", "x")
        assert not Path(path).exists()


def test_the_name_of_what_is_half_written_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with files.whole(tmp_path / "x") as file:
            names.add(file.name)
            assert Path(file.name).parent == tmp_path
    assert len(names) == 2


def test_files_have_the_mode_that_the_user_s_files_have(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    files.write(tmp_path / "x", b"", "")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    link = tmp_path / "figures"
    link.symlink_to(tmp_path / "mine")
    with (
        pytest.raises(UsageError, match=r"figures cannot be written \(figures is a link\): x"),
        files.explained(link, "x"),
    ):
        files.make_folder(link)
    with pytest.raises(OSError, match="figures is a link"):
        files.check_writable(link / "x.json", parents=True)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "it is a pipe, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (lambda path: path.symlink_to("/dev/tty"), "it is a device|No such device"),
        (os.mkdir, "it is a folder, not a file"),
        (lambda path: path.write_bytes(b"12345"), "it has more than 0 MiB"),
        (lambda path: None, "No such file"),
        (lambda path: path.symlink_to(path), "Too many levels"),
    ],
    ids=["pipe", "device", "terminal", "folder", "large", "absent", "circle"],
)
def test_only_files_of_a_bounded_size_are_read(tmp_path: Path, make: Callable, kind: str) -> None:
    path = tmp_path / "x"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=kind):
        files.read(path, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    assert files.read(tmp_path / "x", 4) == b"1234"


def test_json_that_nests_too_deep_is_damaged() -> None:
    with pytest.raises(InvalidError, match=r"here is damaged \(maximum recursion.*\): restore it"):
        files.decoded(b"[" * 100_000, list, "here", "restore it")


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    # Nobody reads yet: neither the check nor its end may wait for a reader, or be taken for one.
    files.check_writable(path, named=True)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    files.write(path, b"content", "", named=True)
    reader.join(60)
    assert found == [b"content"]
    assert path.is_fifo()


def test_the_standard_output_is_continued_where_it_is_a_file(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from resblock_bench.bench import files\n"
        "print('table', flush=True)\n"
        "files.check_writable(Path('/dev/stdout'), named=True)\n"
        "files.write(Path('/dev/stdout'), b'json\\n', '', named=True)\n"
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
