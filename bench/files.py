"""Files: written whole or not at all, and read in the one version of their schema that is known."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from .errors import InvalidError, UsageError

S = TypeVar("S", bound=msgspec.Struct)
_ROOM = 1 << 16  # bytes; more than most of what is written here


@contextlib.contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` where the block ends without an error.

    durable   wait until it is on disk; what can be computed again need not be

    A link is followed. A device or a pipe, such as /dev/stdout, is written to and never replaced.
    Raises OSError.
    """
    if _is_stream(path):
        with path.open("ab") as stream:
            yield stream
        return
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write(path: Path, content: bytes, advice: str) -> None:
    """Write a file whole or not at all. Raises UsageError, which ends with the advice."""
    with explained(path, advice), whole(path) as file:
        file.write(content)


def as_json(content: msgspec.Struct, indent: int = 1) -> bytes:
    """The text of a file that people read."""
    return msgspec.json.format(msgspec.json.encode(content), indent=indent) + b"\n"


def check_writable(path: Path, *, parents: bool = False) -> None:
    """Raises OSError where `whole` would: what takes minutes to measure is not to be lost.

    parents   the folder of the file may be made when it is written

    What the path holds stays, and nothing is made.
    """
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    folder = os.path.dirname(os.path.realpath(path))
    while parents and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b" " * _ROOM)


@contextlib.contextmanager
def explained(path: Path, advice: str) -> Iterator[None]:
    """An OSError of the block as a UsageError: the path cannot be written, why, what to do."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): {advice}") from None


def _is_stream(path: Path) -> bool:
    """Also /dev/stdout where that is a file: whoever opened it goes on writing there."""
    folder = os.path.realpath(path.parent)
    opened_elsewhere = folder == "/dev" or folder.startswith("/proc/")
    return opened_elsewhere or (path.exists() and not path.is_file() and not path.is_dir())


class OtherSchemaError(InvalidError):
    """A file that another version of this suite wrote."""


def read_versioned(path: Path, kind: type[S], field: str, version: int, again: str) -> S:
    """The content of a JSON file, whole and valid.

    field, version   where the schema's version stands, and the one that is read here
    again            what to do about a file of another schema

    Raises OSError where it cannot be read, OtherSchemaError, and InvalidError for one that is
    damaged.
    """
    data = path.read_bytes()
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get(field)
        if found is not None and bytes(found) != str(version).encode():
            raise OtherSchemaError(
                f"{path} is of schema {bytes(found).decode()}, and this version reads {version}: "
                f"{again}"
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidError(f"{path} is damaged ({error}): restore or remove it") from None
