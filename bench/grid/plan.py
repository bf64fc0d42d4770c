"""What a run set out to measure: written beside its rows, so that it can be resumed."""

from pathlib import Path

from msgspec.structs import astuple, replace

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.records import SCHEMA_VERSION, Count, Environment, Positive, Record, Rule

from .grid import PlannedCell


class Plan(Record, frozen=True, kw_only=True):
    """The cells of a run and how they are measured; `threads` None are the usable CPUs."""

    schema_version: int = SCHEMA_VERSION
    device: Kind
    rule: Rule
    seed: int
    threads: Positive | None
    memory_limit_bytes: Count | None
    cells: list[PlannedCell]

    def joined(self, later: "Plan") -> "Plan":
        """This plan with the cells of a later request added, and its memory limit.

        Raises UsageError where the two would be measured differently.
        """
        for field in ("device", "rule", "seed", "threads"):
            mine, asked = getattr(self, field), getattr(later, field)
            if mine != asked and isinstance(mine, Rule):
                field, mine, asked = _first_difference(mine, asked)
            if mine != asked:
                raise UsageError(
                    f"the run was begun with {field} {mine}, and {asked} was asked for: resume it "
                    "with the options it was begun with, or with --output and --resume alone"
                )
        cells = {item.cell: item for item in [*self.cells, *later.cells]}
        limit = later.memory_limit_bytes or self.memory_limit_bytes
        return replace(self, cells=list(cells.values()), memory_limit_bytes=limit)

    def tasks(self, environment: Environment, *, folder: Path | None = None) -> list[Task]:
        """The first attempt at every cell; `folder` as in Task."""
        return [
            Task(
                cell=item.cell,
                multiplicity=item.multiplicity,
                attempt=1,
                device=self.device,
                rule=self.rule,
                seed=self.seed,
                environment=environment,
                memory_limit_bytes=self.memory_limit_bytes,
                folder=None if folder is None else str(folder.resolve()),
            )
            for item in self.cells
        ]


def _first_difference(mine: Rule, asked: Rule) -> tuple[str, object, object]:
    """Of two rules that differ: the field, and its values."""
    fields = zip(Rule.__struct_fields__, astuple(mine), astuple(asked), strict=True)
    return next((field, one, other) for field, one, other in fields if one != other)
