"""The table of equal memory: the largest batch of every published model on every device.

Each model as it was trained: its precision, AdamW, a moving average (classifiers have none), and
attention that the backward computes again where the model is of ADM's code, which does so in every
mode. The file is written after every variant; what it holds of the same code is not planned again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from msgspec import structs
from rich.console import Console

from resblock_bench.bench import files
from resblock_bench.bench.checkout import package_folder, source_state
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.machine.environment import versions
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.measure.fingerprint import code_fingerprint
from resblock_bench.bench.progress import TaskProgress
from resblock_bench.bench.records import Record
from resblock_bench.reference import PUBLISHED

from .plans import DEVICES, Planner, PlanRequest, variant_title
from .subject import Subject
from .training import Recipe, published_precision
from .variant import VariantPlan

SCHEMA_VERSION = 1
COMMAND = "resblock-bench plan --published"
_ADVICE = "name another file"
_BATCH = 2  # of the first step: the least that PyTorch does not treat as a case of its own


class EqualMemoryRow(Record, frozen=True, kw_only=True):
    """A variant of a model; `largest` are batches, one for each device of the table."""

    model: str
    plan: VariantPlan
    largest: list[int]


class EqualMemoryTable(Record, frozen=True, kw_only=True):
    """What --published writes; `code` as in fingerprint.py."""

    schema_version: int = SCHEMA_VERSION
    command: str = COMMAND
    devices: list[int]
    rows: list[EqualMemoryRow]
    problems: dict[str, str]
    versions: dict[str, str | None]
    code: str
    commit: str | None
    dirty: bool | None

    def largest(self, model: str, impl: str, checkpoint: str, device_bytes: int) -> int | None:
        """A model's largest batch in a variant, or None where that is not planned."""
        for row in self.rows:
            if (row.model, row.plan.recipe.impl, row.plan.recipe.checkpoint) == (
                model, impl, checkpoint,
            ):  # fmt: skip
                return row.largest[self.devices.index(device_bytes)]
        return None


def request_as_trained(model: str) -> PlanRequest:
    config = PUBLISHED[model]
    return PlanRequest(
        subject=Subject(name=model, config=config),
        precision=published_precision(config),
        batch=_BATCH,
        ema=config.family != "encoder",
        recompute_attention=model.startswith("adm-"),
    )


def wanted() -> Iterator[tuple[str, Recipe]]:
    """All variants, model by model."""
    for model in PUBLISHED:
        for recipe in request_as_trained(model).recipes():
            yield model, recipe


def begun(json: Path | None) -> EqualMemoryTable:
    """The table so far, its rows those that this code would make."""
    commit, dirty = source_state(package_folder("bench"))
    empty = EqualMemoryTable(
        devices=list(DEVICES),
        rows=[],
        problems={},
        versions=versions(),
        code=code_fingerprint(),
        commit=commit,
        dirty=dirty,
    )
    if json is None or not json.exists():
        return empty
    try:
        before = read_table(json)
    except InvalidError as error:
        raise UsageError(f"{error}; it is not overwritten") from None
    same = (before.code, before.versions["torch"], before.devices) == (
        empty.code, empty.versions["torch"], empty.devices,
    )  # fmt: skip
    return structs.replace(empty, rows=before.rows) if same else empty


def read_table(path: Path) -> EqualMemoryTable:
    """Raises OSError, InvalidError."""
    return files.read_versioned(
        path, EqualMemoryTable, "schema_version", SCHEMA_VERSION, "write it anew"
    )


def completed(
    table: EqualMemoryTable, json: Path | None, progress: Console
) -> tuple[EqualMemoryTable, bool]:
    """The table with what was missing, and whether an interrupt came before its end."""
    have = {(row.model, row.plan.recipe) for row in table.rows}
    missing = [item for item in wanted() if item not in have]
    try:
        with closing(Processes()) as processes, TaskProgress(progress, len(missing)) as bar:
            for model, recipe in missing:
                name = f"{model} {variant_title(recipe)}"
                bar.begin(name)
                planner = Planner(request_as_trained(model).subject, _BATCH, DEVICES, processes)
                plan = planner.plan(recipe)
                if plan is None:
                    problem = planner.replies[recipe].problem or ""
                    table = structs.replace(table, problems={**table.problems, name: problem})
                else:
                    largest = [plan.largest_batch(capacity) for capacity in DEVICES]
                    row = EqualMemoryRow(model=model, plan=plan, largest=largest)
                    table = structs.replace(table, rows=_ordered([*table.rows, row]))
                if json is not None:
                    files.write(json, files.as_json(table), _ADVICE, named=True)
                bar.finish(name)
    except KeyboardInterrupt:
        return table, True
    return table, False


def _ordered(rows: list[EqualMemoryRow]) -> list[EqualMemoryRow]:
    order = {item: number for number, item in enumerate(wanted())}
    return sorted(rows, key=lambda row: order.get((row.model, row.plan.recipe), len(order)))
