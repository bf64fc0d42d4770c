"""What an output folder of `gpu-results` holds, read and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.compare.calibration import Calibration
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.fit.plans import MemoryPlan
from resblock_bench.bench.records import Environment, Row
from resblock_bench.bench.runs.folder import PLAN, Run, read_run
from resblock_bench.bench.terminal import visible

from .operators import OperatorRow, read_rows
from .outcomes import StepOutcome, read_outcomes
from .parts import MACHINES, TWINS

T = TypeVar("T")


@dataclass(frozen=True)
class GpuResults:
    """Rows that a part has written, whatever became of its steps.

    machines      by the names that outcomes have
    operators     of all labels, also those that were begun and of which nothing came
    runs, plans   by the names of their steps
    notes         sentences about what could not be read
    """

    folder: Path
    outcomes: Sequence[StepOutcome]
    machines: dict[str, Environment]
    operators: Sequence[OperatorRow]
    runs: dict[str, Run]
    plans: dict[str, MemoryPlan]
    calibrations: Sequence[Calibration]
    notes: Sequence[str]

    @property
    def rows(self) -> list[Row]:
        """Of all runs but that of twins."""
        return [row for name, run in self.runs.items() if name != TWINS for row in run.rows]

    @property
    def twins(self) -> list[Row]:
        return self.runs[TWINS].rows if TWINS in self.runs else []


def read_results(folder: Path) -> GpuResults:
    """All that is in a folder; a file that is damaged is left out, with a note.

    Raises UsageError where there is none, InvalidError where its outcomes are damaged.
    """
    outcomes = read_outcomes(folder)
    notes: list[str] = []
    runs: dict[str, Run] = {}
    for path in sorted(folder.glob(f"runs/*/{PLAN}")):
        try:
            runs[path.parent.name] = read_run(path.parent)
        except (UsageError, InvalidError) as error:
            notes.append(str(error))
    rows = [row for path in sorted(folder.glob("operators*.jsonl")) for row in read_rows(path)]
    return GpuResults(
        folder=folder,
        outcomes=outcomes,
        machines=_decoded(folder, f"{MACHINES}/*.json", Environment, notes),
        operators=rows,
        runs=runs,
        plans=_decoded(folder, "plans/*.json", MemoryPlan, notes),
        calibrations=list(_decoded(folder, "calibration/*.json", Calibration, notes).values()),
        notes=notes,
    )


def _decoded(folder: Path, pattern: str, kind: type[T], notes: list[str]) -> dict[str, T]:
    """The valid files of a pattern by their names."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        try:
            found[path.stem] = msgspec.json.decode(files.read(path), type=kind)
        except (OSError, msgspec.MsgspecError) as error:
            notes.append(visible(f"{path} was left out: {error}"))
    return found
