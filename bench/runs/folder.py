"""A run folder: rows as JSON lines, flushed one by one; the plan; the environment; the figures.

    <output>/cells.jsonl  plan.json  environment.json  figures/  snapshots/
    <output>/CLASS-DIGEST.json   of every model of diffusers its configuration, to be given again

It is opened once, as a Run: `create_run` begins one, `resume_run` goes on with it, `read_run` only
reads. What was measured survives whatever ends the run: a row is on disk before the next cell
starts, and of a row that was cut off nothing is believed. Reading checks everything and names file
and line.
"""

import datetime
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from resblock_bench.bench import files
from resblock_bench.bench.checkout import checkout_around
from resblock_bench.bench.errors import InvalidError, UsageError, command
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine.environment import difference
from resblock_bench.bench.records import SCHEMA_VERSION, Cell, Contract, Environment, Row, cell_id

CELLS = "cells.jsonl"
PLAN = "plan.json"
ENVIRONMENT = "environment.json"
FIGURES = "figures"
CELLS_BYTES = 1 << 30
"""The most that is read: of rows with all their samples about 100,000."""
S = TypeVar("S", bound=msgspec.Struct)
_ADVICE = "give an --output that is writable"


def config_file(cell: Cell) -> str:
    """In which file of a run folder a model of diffusers has its configuration."""
    return f"{cell.model}.json"


@dataclass
class Run:
    """A run folder that was opened.

    plan          what it set out to measure
    environment   the machine
    attempts      every row, in the order in which they were written
    notes         sentences about what was left out
    """

    folder: Path
    plan: Plan
    environment: Environment
    attempts: list[Row]
    notes: tuple[str, ...] = ()
    _file: int = -1
    _whole: int = 0  # bytes of the rows that were read; half a row may follow

    @property
    def rows(self) -> list[Row]:
        """Of each cell the last attempt, in the order in which the cells were first measured.

        Whatever code measured it; but a cell that was skipped hides no measurement.
        """
        found: dict[tuple[Cell, Contract], Row] = {}
        for row in self.attempts:
            before = found.setdefault((row.axes, row.contract), row)
            if row.status != "skipped" or before.status != "ok":
                found[row.axes, row.contract] = row
        return list(found.values())

    def go_on(self, plan: Plan, found: Environment) -> str | None:
        """Continue on this machine with the cells of `plan`; returns what was mended of the rows.

        The ceilings stay those that were measured at first. Raises UsageError on another machine or
        with other software: of a folder that is refused nothing is touched.
        """
        differs = difference(self.environment, found)
        if differs is not None:
            raise UsageError(
                f"{self.folder} was measured on another machine or with other software "
                f"({differs}): resume it there, or begin a new run with another --output"
            )
        self.plan = plan
        self.environment = replace(found, ceilings=self.environment.ceilings)
        mended = None
        size = os.fstat(self._file).st_size
        if size > self._whole:
            os.ftruncate(self._file, self._whole)
            os.fsync(self._file)
            mended = f"the half-written last line of {self.folder / CELLS} was removed"
        elif size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")
        self.describe()
        return mended

    def describe(self) -> None:
        """Write down what is going to be measured, and on what."""
        for name, content in ((PLAN, self.plan), (ENVIRONMENT, self.environment)):
            files.write(self.folder / name, files.as_json(content, indent=2), _ADVICE)
        cells = (item.cell for item in self.plan.cells)
        configs = {config_file(cell): cell.config for cell in cells if cell.config is not None}
        for name, config in configs.items():
            files.write(self.folder / name, config.encode() + b"\n", _ADVICE)

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on disk, unless nothing was run for it.

        Raises OSError where it could not be written; what was there before stays intact.
        """
        line = msgspec.json.encode(row) + b"\n"
        end = os.fstat(self._file).st_size
        written = 0
        try:
            self.attempts.append(row)
            while written < len(line):
                written += os.write(self._file, line[written:])
            if row.wall_s is not None:  # a skipped cell costs nothing to find again
                os.fsync(self._file)
        except BaseException as error:
            # A row that is whole when an interrupt comes stays. Half a line would make the whole
            # folder unreadable.
            if isinstance(error, OSError) or written < len(line):
                os.ftruncate(self._file, end)
                self.attempts = [other for other in self.attempts if other is not row]
            raise


def default_output(machine: str, start: Path) -> Path:
    """results/runs/<machine>/<run id> in the project checkout around `start`, else in `start`.

    The run id is the UTC time and four random hexadecimal digits.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return checkout_around(start) / "results" / "runs" / machine / run_id


@contextmanager
def create_run(folder: Path, plan: Plan, environment: Environment) -> Iterator[Run]:
    """A new run in a folder, which is made where there is none.

    Raises UsageError where it cannot be written, is being written by another run, or holds a run.
    """
    with files.explained(folder, _ADVICE):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give another --output")
        folder.mkdir(parents=True, exist_ok=True)
        file = files.open_to_append(folder / CELLS, create=True)
    with _locked(file, folder):
        # A run that was ended before it had a plan has left nothing but an empty file.
        if (folder / PLAN).exists() or os.fstat(file).st_size:
            raise UsageError(
                f"{folder} already holds a run: continue it with --resume, give another --output, "
                "or remove it"
            )
        run = Run(folder, plan, environment, [], _file=file)
        run.describe()
        yield run


@contextmanager
def resume_run(folder: Path) -> Iterator[Run]:
    """A run as `read_run` reads it, to `go_on` with.

    Raises UsageError also where it cannot be written or is being written by another run.
    """
    with files.explained(folder, _ADVICE):
        if not (folder / CELLS).exists():
            raise UsageError(
                f"{folder} holds no run to resume ({CELLS} is missing): leave out --resume"
            )
        file = files.open_to_append(folder / CELLS)
    with _locked(file, folder):
        run = read_run(folder)
        run._file = file
        yield run


@contextmanager
def _locked(file: int, folder: Path) -> Iterator[None]:
    """No other run writes to the open file, which is closed at the end."""
    try:
        # The lock goes with the process, so a killed run leaves none.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(
            f"another run is writing to {folder}: wait until it ends, or give another --output"
        ) from None
    try:
        yield
    finally:
        os.close(file)


def read_run(folder: Path) -> Run:
    """A run folder, every line validated. Raises UsageError where there is none, and InvalidError
    naming file and line.

    A half-written last line is what a killed run leaves: it is left out, with a note. All else that
    is not a row is an error.
    """
    plan, environment = _decoded(folder / PLAN, Plan), _decoded(folder / ENVIRONMENT, Environment)
    content = _read(folder / CELLS, CELLS_BYTES)
    whole = content.rfind(b"\n") + 1
    if _is_row(content[whole:]):  # only the line feed is missing
        whole = len(content)
    run = Run(folder, plan, environment, [], _whole=whole)
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        row = _read_row(line, f"{folder / CELLS}, line {number}")
        before = seen.setdefault((row.id, row.attempt), number)
        if before != number:
            raise InvalidError(
                f"{folder / CELLS}, line {number} repeats the cell of line {before}; "
                "remove one of them"
            )
        run.attempts.append(row)
    if whole < len(content):
        run.notes = (
            f"the last line of {folder / CELLS} is half-written and was left out: its cell is "
            f"measured again by '{command('run', '--resume', '--output', str(folder))}'",
        )
    return run


def _read(path: Path, most: int = files.DOCUMENT_BYTES) -> bytes:
    try:
        return files.read(path, most)
    except OSError as error:
        raise UsageError(
            f"{path.parent} is not a run folder: {path.name} cannot be read ({error.strerror}); "
            "give a folder that 'resblock-bench run' wrote"
        ) from None


def _decoded(path: Path, kind: type[S]) -> S:
    return files.decoded(_read(path), kind, path, "restore it")


def _is_row(line: bytes) -> bool:
    """Whether a line is whole."""
    try:
        files.decoded(line, Row, "it", "")
    except InvalidError:
        return False
    return True


class _Version(msgspec.Struct):
    schema_version: int


def _read_row(line: bytes, place: str) -> Row:
    advice = "remove that line to read the rest"
    version = files.decoded(line, _Version, place, advice).schema_version
    if version != SCHEMA_VERSION:
        raise InvalidError(
            f"{place} has schema version {version}, but this version of resblock-bench reads "
            f"{SCHEMA_VERSION}; read it with the version that wrote it"
        )
    row = files.decoded(line, Row, place, advice)
    if row.id != cell_id(row.axes, row.contract, row.code):
        raise InvalidError(
            f"{place} was changed: its id {row.id} is not the address of its axes, contract "
            f"and code; {advice}"
        )
    return row
