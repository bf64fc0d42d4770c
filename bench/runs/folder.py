"""A run folder: rows as JSON lines, flushed one by one; the plan; the environment; the figures.

    <output>/cells.jsonl  plan.json  environment.json  figures/  snapshots/

What was measured survives whatever ends the run: a row is on disk before the next cell starts, and
of a row that was cut off nothing is believed. Reading checks everything and names file and line.
"""

import datetime
import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.checkout import checkout_around
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.records import SCHEMA_VERSION, Environment, Row, cell_id

CELLS = "cells.jsonl"
PLAN = "plan.json"
ENVIRONMENT = "environment.json"
FIGURES = "figures"
_ADVICE = "give an --output that is writable"


class Run(NamedTuple):
    """A run folder as read back.

    rows    of each cell the last attempt, in the order in which the cells were first measured
    notes   sentences about what was left out
    """

    folder: Path
    environment: Environment
    rows: list[Row]
    notes: tuple[str, ...] = ()


def default_output(machine: str, start: Path) -> Path:
    """results/runs/<machine>/<run id> in the project checkout around `start`, else in `start`.

    The run id is the UTC time and four random hexadecimal digits.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return checkout_around(start) / "results" / "runs" / machine / run_id


class RunWriter:
    """Appends rows to a run folder, which no other writer may have open.

    Raises UsageError where the folder cannot be written, is being written by another run, or
    already holds a run and `resume` is false.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder = folder
        self.count = 0
        try:
            if not resume:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / FIGURES).mkdir(exist_ok=True)
            # A run that was ended before it had a plan has left nothing but an empty file.
            fresh = not resume and not _is_bare(folder)
            flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if fresh else 0)
            self._file = os.open(folder / CELLS, flags, 0o644)
        except FileExistsError as error:
            if error.filename is not None and Path(error.filename).name == CELLS:
                raise UsageError(
                    f"{folder} already holds a run: continue it with --resume, give another "
                    "--output, or remove it"
                ) from None
            raise UsageError(f"{error.filename} is not a folder: give another --output") from None
        except OSError as error:
            if resume and isinstance(error, FileNotFoundError):
                raise UsageError(
                    f"{folder} holds no run to resume ({CELLS} is missing): leave out --resume"
                ) from None
            raise UsageError(f"{folder} cannot be written ({error.strerror}): {_ADVICE}") from None
        try:
            # The lock goes with the process, so a killed run leaves none.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UsageError(
                f"another run is writing to {folder}: wait until it ends, or give another --output"
            ) from None

    def describe(self, plan: Plan, environment: Environment) -> None:
        """Write down what is going to be measured, and on what."""
        for name, content in ((PLAN, plan), (ENVIRONMENT, environment)):
            files.write(self.folder / name, files.as_json(content, indent=2), _ADVICE)

    def repair(self) -> str | None:
        """Mend the last line where a killed run has left half of it; returns what was done."""
        content = (self.folder / CELLS).read_bytes()
        whole, torn = _split_torn(content)
        if not torn:
            return None
        if _is_row(torn):
            os.write(self._file, b"\n")
            return None
        os.ftruncate(self._file, whole)
        os.fsync(self._file)
        return f"the half-written last line of {self.folder / CELLS} was removed"

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on disk, unless nothing was run for it.

        Raises OSError where it could not be written; what was there before stays intact.
        """
        line = msgspec.json.encode(row) + b"\n"
        end = os.fstat(self._file).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
            if row.wall_s is not None:  # a skipped cell costs nothing to find again
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


def _is_bare(folder: Path) -> bool:
    cells = folder / CELLS
    return cells.exists() and cells.stat().st_size == 0 and not (folder / PLAN).exists()


def read_run(folder: Path) -> Run:
    """A run folder, every line validated. Raises UsageError where there is none, and InvalidError
    naming file and line.

    A half-written last line is what a killed run leaves: it is left out, with a note. All else that
    is not a row is an error.
    """
    environment = read_environment(folder)
    every, torn = _read_cells(folder)
    # Of a cell that was measured again, by a further attempt or by other code, the last row.
    rows = {(row.axes, row.contract): row for row in every}
    note = (
        f"the last line of {folder / CELLS} is half-written and was left out: its cell is "
        "measured again by 'resblock-bench run --resume'"
    )
    return Run(folder, environment, list(rows.values()), (note,) if torn else ())


def read_rows(folder: Path) -> list[Row]:
    """Every row of a run folder in the order in which they were written, all attempts."""
    return _read_cells(folder)[0]


def read_environment(folder: Path) -> Environment:
    """The machine of a run."""
    environment: Environment = _decoded(folder / ENVIRONMENT, Environment)
    return environment


def read_plan(folder: Path) -> Plan:
    """What a run set out to measure."""
    plan: Plan = _decoded(folder / PLAN, Plan)
    return plan


def _read_cells(folder: Path) -> tuple[list[Row], bool]:
    """The rows, and whether half a line follows them."""
    content = _read(folder / CELLS)
    whole, torn = _split_torn(content)
    if torn and _is_row(torn):
        whole, torn = len(content), b""
    lines = content[:whole].split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    rows: list[Row] = []
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines, start=1):
        row = _read_row(line, f"{folder / CELLS}, line {number}")
        before = seen.setdefault((row.id, row.attempt), number)
        if before != number:
            raise InvalidError(
                f"{folder / CELLS}, line {number} repeats the cell of line {before}; "
                "remove one of them"
            )
        rows.append(row)
    return rows, bool(torn)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path.parent} is not a run folder: {path.name} cannot be read ({error.strerror}); "
            "give a folder that 'resblock-bench run' wrote"
        ) from None


def _decoded(path: Path, kind: type[msgspec.Struct]) -> Any:
    text = _read(path)
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidError(f"{path} is damaged: {error}; restore it") from None


def _split_torn(content: bytes) -> tuple[int, bytes]:
    """Where the lines end that a line feed ends, and what stands after them."""
    whole = content.rfind(b"\n") + 1
    return whole, content[whole:]


def _is_row(line: bytes) -> bool:
    """Whether only the line feed is missing."""
    try:
        msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


class _Version(msgspec.Struct):
    schema_version: int


def _read_row(line: bytes, place: str) -> Row:
    try:
        version = msgspec.json.decode(line, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise InvalidError(
                f"{place} has schema version {version}, but this version of resblock-bench reads "
                f"{SCHEMA_VERSION}; read it with the version that wrote it"
            )
        row = msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidError(
            f"{place} is damaged: {error}; remove that line to read the rest"
        ) from None
    if row.id != cell_id(row.axes, row.contract, row.code):
        raise InvalidError(
            f"{place} was changed: its id {row.id} is not the address of its axes, contract "
            "and code; remove that line to read the rest"
        )
    return row
