"""A run folder: rows as JSON lines, flushed one by one; the environment; the figures.

    <output>/cells.jsonl  environment.json  figures/

What was measured survives whatever ends the run: a row is written whole or not at all, and is on
disk before the next cell starts. Reading checks everything and names file and line.
"""

import datetime
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.records import SCHEMA_VERSION, Environment, Row, cell_id

CELLS = "cells.jsonl"
ENVIRONMENT = "environment.json"
FIGURES = "figures"


class Run(NamedTuple):
    """A run folder as read back."""

    folder: Path
    environment: Environment
    rows: list[Row]


def default_output(machine: str, start: Path) -> Path:
    """results/runs/<machine>/<run id> in the project checkout around `start`, else in `start`.

    The run id is the UTC time and four random hexadecimal digits.
    """
    root = next((folder for folder in (start, *start.parents) if _is_checkout(folder)), start)
    now = datetime.datetime.now(datetime.timezone.utc)
    run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return root / "results" / "runs" / machine / run_id


def _is_checkout(folder: Path) -> bool:
    try:
        return 'name = "resblock-bench"' in (folder / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


class RunWriter:
    """Creates a run folder and appends rows to it.

    Raises UsageError where the folder cannot be written or already holds a run.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self.count = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FIGURES).mkdir(exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._file = os.open(folder / CELLS, flags, 0o644)
            text = msgspec.json.format(msgspec.json.encode(environment), indent=2)
            (folder / ENVIRONMENT).write_bytes(text + b"\n")
        except FileExistsError as error:
            if error.filename is not None and Path(error.filename).name == CELLS:
                raise UsageError(
                    f"{folder} already holds a run: give another --output, or remove it"
                ) from None
            raise UsageError(f"{error.filename} is not a folder: give another --output") from None
        except OSError as error:
            raise UsageError(
                f"cannot write to {folder}: {error.strerror}; give an --output that is writable"
            ) from None

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on disk.

        Raises OSError where it could not be written; what was there before stays intact.
        """
        line = msgspec.json.encode(row) + b"\n"
        end = os.fstat(self._file).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except BaseException as error:
            if isinstance(error, OSError) or written < len(line):
                # Half a line would make the whole folder unreadable.
                os.ftruncate(self._file, end)
            else:
                self.count += 1  # interrupted, but the row is whole
            raise
        self.count += 1

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)


def read_run(folder: Path) -> Run:
    """A run folder, every line validated. Raises UsageError naming file and line."""
    try:
        lines = (folder / CELLS).read_bytes().splitlines()
        text = (folder / ENVIRONMENT).read_bytes()
    except OSError as error:
        raise UsageError(
            f"{folder} is not a run folder: {Path(error.filename).name} cannot be read "
            f"({error.strerror}); give a folder that 'resblock-bench run' wrote"
        ) from None
    try:
        environment = msgspec.json.decode(text, type=Environment)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / ENVIRONMENT} is damaged: {error}; restore it") from None
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        row = _read_row(line, f"{folder / CELLS}, line {number}")
        if row.id in seen:
            raise UsageError(
                f"{folder / CELLS}, line {number} repeats the cell of line {seen[row.id]}; "
                "remove one of them"
            )
        seen[row.id] = number
        rows.append(row)
    return Run(folder, environment, rows)


class _Version(msgspec.Struct):
    schema_version: int


def _read_row(line: bytes, place: str) -> Row:
    try:
        version = msgspec.json.decode(line, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{place} has schema version {version}, but this version of resblock-bench reads "
                f"{SCHEMA_VERSION}; read it with the version that wrote it"
            )
        row = msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{place} is damaged: {error}; remove that line to read the rest"
        ) from None
    if row.id != cell_id(row.axes, row.contract, row.code):
        raise UsageError(
            f"{place} was changed: its id {row.id} is not the address of its axes, contract "
            "and code; remove that line to read the rest"
        )
    return row
