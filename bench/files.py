"""Files: written whole or not at all, read only where they are files and of a bounded size.

A run folder, pins and baselines may be somebody else's. A link that lies in them is replaced by
what is written there, and never followed; a folder in them that is a link is refused. What the user
names, such as `--output FILE`, may be a link, a device or a pipe: that is followed, or written to.
"""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from .errors import InvalidError, UsageError

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
_ROOM = 1 << 16  # bytes; more than most of what is written here
DOCUMENT_BYTES = 1 << 26
"""What one file of settings or results may hold: 64 MiB, a plan of 100,000 cells."""
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextlib.contextmanager
def whole(path: Path, *, named: bool = False, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` where the block ends without an error.

    named     the user named the path: a link is followed, and a device or a pipe, such as
              /dev/stdout, is written to and never replaced
    durable   wait until it is on disk; what can be computed again need not be

    Raises OSError.
    """
    if named and _is_stream(path):
        with path.open("ab") as stream:
            yield stream
        return
    target = Path(os.path.realpath(path)) if named else path
    if _among_devices(target):
        raise OSError(errno.EPERM, "no file is kept there")
    # A name that nobody can have put a link at beforehand; "x" opens what it makes, nothing else.
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write(path: Path, content: bytes, advice: str, *, named: bool = False) -> None:
    """Write a file whole or not at all. Raises UsageError, which ends with the advice."""
    with explained(path, advice), whole(path, named=named) as file:
        file.write(content)


def make_folder(path: Path) -> None:
    """A folder inside one that may be somebody else's. Raises OSError where it is a link."""
    _refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise OSError(errno.ELOOP, f"{folder.name} is a link")


def as_json(content: msgspec.Struct, indent: int = 1) -> bytes:
    """The text of a file that people read."""
    return msgspec.json.format(msgspec.json.encode(content), indent=indent) + b"\n"


def check_writable(path: Path, *, named: bool = False, parents: bool = False) -> None:
    """Raises OSError where `whole` would: what takes minutes to measure is not to be lost.

    parents   the folder of the file may be made when it is written

    What the path holds stays, and nothing is made.
    """
    if named and _is_stream(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    target = Path(os.path.realpath(path)) if named else path
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    folder = target.parent
    if parents:
        _refuse_link(folder)
    while parents and not os.path.lexists(folder):
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b" " * _ROOM)


@contextlib.contextmanager
def explained(path: Path, advice: str) -> Iterator[None]:
    """An OSError of the block as a UsageError: the path cannot be written, why, what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{path} cannot be written ({why}): {advice}") from None


def _is_stream(path: Path) -> bool:
    """Also /dev/stdout where that is a file: whoever opened it goes on writing there."""
    return _among_devices(path) or (path.exists() and not path.is_file() and not path.is_dir())


def _among_devices(path: Path) -> bool:
    folder = os.path.realpath(path.parent)
    return folder == "/dev" or folder.startswith("/proc/")


def read(path: Path, most: int = DOCUMENT_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises OSError, which says so, for a pipe or a device, that may never end, and a larger file.
    """
    file = _opened(path, os.O_RDONLY)
    with open(file, "rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB, the most that is read")
    return content


def open_to_append(path: Path, *, create: bool = False) -> int:
    """The descriptor of a file that is written to where it lies, and read.

    Raises OSError where it is a link, or no regular file.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a link")
    return _opened(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if create else 0))


def _opened(path: Path, flags: int) -> int:
    """The descriptor of a regular file. Raises OSError for anything else."""
    # A pipe that nobody writes to is opened at once, too.
    file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    kind = _KINDS.get(stat.S_IFMT(os.fstat(file).st_mode))
    if kind is not None:
        os.close(file)
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")
    return file


class OtherSchemaError(InvalidError):
    """A file that another version of this suite wrote."""


def decoded(data: bytes, kind: type[T], place: object, advice: str) -> T:
    """JSON of a type. Raises InvalidError: what is damaged at the place, and what to do."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidError(f"{place} is damaged ({error}): {advice}") from None


def read_versioned(path: Path, kind: type[S], field: str, version: int, again: str) -> S:
    """The content of a JSON file, whole and valid.

    field, version   where the schema's version stands, and the one that is read here
    again            what to do about a file of another schema

    Raises OSError where it cannot be read, OtherSchemaError, and InvalidError for one that is
    damaged.
    """
    data, advice = read(path), "restore or remove it"
    head: dict[str, Any] = decoded(data, dict[str, msgspec.Raw], path, advice)
    found = head.get(field)
    if found is not None and bytes(found) != str(version).encode():
        raise OtherSchemaError(
            f"{path} is of schema {bytes(found)[:20].decode(errors='replace')}, and this version "
            f"reads {version}: {again}"
        )
    return decoded(data, kind, path, advice)
