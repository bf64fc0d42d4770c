"""Reads a JSON file that begins with the version of its schema: whole and valid, or not at all."""

from pathlib import Path
from typing import TypeVar

import msgspec

from .errors import InvalidError

S = TypeVar("S", bound=msgspec.Struct)


class OtherSchemaError(InvalidError):
    """A file that another version of this suite wrote."""


def read_versioned(path: Path, kind: type[S], field: str, version: int, again: str) -> S:
    """The content of a file.

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
