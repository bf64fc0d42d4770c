"""The committed table, and what the documents say of it."""

import re
from pathlib import Path

import msgspec
import pytest
import torch

from resblock_bench.bench.fit.equal_memory import EqualMemoryTable, read_table, wanted
from resblock_bench.bench.fit.plans import DEVICES, GIB
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.variant import VariantJob, variant_plan
from resblock_bench.reference import PUBLISHED

ROOT = Path(__file__).parents[3]
COLUMNS = (("reference", "none"), ("fused", "none"), ("fused", "selective"), ("fused", "full"))


@pytest.fixture(scope="module")
def table() -> EqualMemoryTable:
    return read_table(ROOT / "results/plan/published.json")


def test_the_committed_table_is_whole_and_of_a_commit(table: EqualMemoryTable) -> None:
    assert [(row.model, row.plan.recipe) for row in table.rows] == list(wanted())
    assert table.commit is not None
    assert table.dirty is False
    for row in table.rows:
        assert row.largest == [row.plan.largest_batch(capacity) for capacity in table.devices]


def test_the_documented_table_is_the_committed_one(table: EqualMemoryTable) -> None:
    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| ([\w-]+-[\w-]+) \| (\d.*) \|$", text, re.MULTILINE))
    assert list(shown) == list(PUBLISHED)
    for model, numbers in shown.items():
        largest = [table.largest(model, *column, 80 * GIB) for column in COLUMNS]
        ratio = f"{largest[2] / largest[0]:.2f}"
        assert numbers.split(" | ") == [*(f"{n:,}" for n in largest), ratio]


def test_the_readme_says_what_the_table_says(table: EqualMemoryTable) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"By \[arithmetic on tensors\].*?\.\n\n", text, re.DOTALL)
    model, numbers = re.findall(r"adm-[\w-]+", sentence)[0], re.findall(r"\*\*(\d+)\*\*", sentence)
    assert list(map(int, numbers)) == [
        table.largest(model, *column, 80 * GIB) for column in COLUMNS[:3]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "number"), [("iddpm-cifar10-uncond", 4), ("adm-classifier128", 0)]
)
def test_the_committed_table_is_what_this_code_plans(
    table: EqualMemoryTable, model: str, number: int
) -> None:
    """Where it has changed: `make` it anew by the command that it holds, and mend the documents."""
    ours, theirs = torch.__version__, str(table.versions["torch"])
    if ours.split(".")[:2] != theirs.split(".")[:2]:
        pytest.skip(f"torch is {ours}, and the table of {theirs}")
    row = [row for row in table.rows if row.model == model][number]
    subject = Subject(name=model, config=PUBLISHED[model])
    job = VariantJob(
        subject=subject, recipe=row.plan.recipe, batch=row.plan.batch, capacities=list(DEVICES)
    )
    now = variant_plan(job)
    took = {"cpu_s": 0.0, "resident_bytes": 0}
    assert msgspec.structs.replace(now, **took) == msgspec.structs.replace(row.plan, **took)
