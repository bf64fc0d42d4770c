"""What became of the steps: a line of steps.jsonl each, on disk before the next step begins."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.records import NonNegative, Record

from .parts import FOLDERS

OUTCOMES = "steps.jsonl"
_ADVICE = "give an --output that is writable, or make room: nothing that was measured is lost"
_BYTES = 1 << 26
StepStatus = Literal["ok", "failed", "timeout", "skipped", "cut", "again"]
OVER = ("ok", "failed", "timeout", "skipped")
"""`cut`: it goes on in the next slice; `again`: what came of it before does not count any more."""


class StepOutcome(Record, frozen=True, kw_only=True):
    """What became of a step in a slice.

    exit_code   -n for signal n; None where nothing ran, or it was stopped
    sentence    the last line that it printed and that says something, or why nothing ran
    machine     the name of a file of machines/; "" where the machine could not be asked
    """

    part: int
    step: str
    status: StepStatus
    exit_code: int | None
    seconds: NonNegative
    sentence: str
    command: list[str]
    started_at: str
    machine: str


class OutcomeFile:
    """The outcomes of an output folder, which one slice at a time appends to."""

    def __init__(self, file: int, path: Path, outcomes: list[StepOutcome]) -> None:
        self._file, self.path, self.outcomes = file, path, outcomes

    def append(self, outcome: StepOutcome) -> None:
        """Write it, and wait until it is on disk. Raises OSError; what was there stays whole."""
        end = os.fstat(self._file).st_size
        line = msgspec.json.encode(outcome) + b"\n"
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, end)
            raise
        self.outcomes.append(outcome)


@contextlib.contextmanager
def opened(output: Path) -> Iterator[OutcomeFile]:
    """The outcomes of a folder, which is made where there is none; half a last line is removed.

    Raises UsageError where it cannot be written or another slice writes to it, InvalidError for
    what is no outcome.
    """
    path = output / OUTCOMES
    with files.explained(output, _ADVICE):
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is not a folder: give another --output")
        for folder in (output, *(output / name for name in FOLDERS)):
            folder.mkdir(parents=True, exist_ok=True)
        file = files.open_to_append(path, create=True)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another gpu-results is writing to {output}: wait until it ends, or give another "
                "--output"
            ) from None
        found, whole = decoded(files.read(path, _BYTES), path)
        if os.fstat(file).st_size > whole:
            os.ftruncate(file, whole)
        yield OutcomeFile(file, path, found)
    finally:
        os.close(file)


def read_outcomes(output: Path) -> list[StepOutcome]:
    """Raises UsageError where there are none, InvalidError for what is no outcome."""
    path = output / OUTCOMES
    try:
        return decoded(files.read(path, _BYTES), path)[0]
    except OSError as error:
        raise UsageError(
            f"{output} holds no results of a GPU: {OUTCOMES} cannot be read ({error.strerror}); "
            "name the folder that 'resblock-bench gpu-results' wrote"
        ) from None


def decoded(content: bytes, path: Path) -> tuple[list[StepOutcome], int]:
    """The outcomes of a file, and how many bytes hold them: a half-written last line is none."""
    whole = content.rfind(b"\n") + 1
    found = [
        files.decoded(line, StepOutcome, f"{path}, line {number}", "remove that line")
        for number, line in enumerate(content[:whole].splitlines(), start=1)
    ]
    return found, whole


def last_outcomes(outcomes: Sequence[StepOutcome]) -> dict[str, StepOutcome]:
    """The last outcome of each step, by its name."""
    return {outcome.step: outcome for outcome in outcomes}
