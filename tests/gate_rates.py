"""How often the timing gate cries wolf, and how often it sees a real slowdown.

    python tests/gate_rates.py --slowdown 0 --comparisons 200 --output rates.jsonl
    python tests/gate_rates.py --slowdown 0.05 --comparisons 100 --output rates.jsonl

Compares the kernels with themselves, or with a copy whose block spins for that share of its own
time, one cell a comparison, in turn over CELLS. Every comparison is what `compare --base` does with
a cell, a confirming draw included, and appends a line: what was spun in, the cell, the verdict. It
takes a quarter of a minute to a whole one a comparison, on a machine that does nothing else.
These rates are measured, not assumed: how much drift pairs cancel depends on the machine.
"""

import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track

from resblock_bench.bench.axes import parse_arguments
from resblock_bench.bench.compare import tolerance_here
from resblock_bench.bench.comparison import Compared, Comparison
from resblock_bench.bench.fingerprint import package_folder
from resblock_bench.bench.grid import plan
from resblock_bench.bench.plan import Plan
from resblock_bench.bench.presets import named
from resblock_bench.bench.records import Record, cell_name
from resblock_bench.bench.rounds import RoundRule, measure_pair
from resblock_bench.bench.source_tree import python_paths
from resblock_bench.bench.testbed import opened

# Forward is the whole step here, so that the share of its time is that of the step's.
COMMON = ["impl=fused", "mode=inference", "batch=1"]
CELLS = [
    [*COMMON, "channels=64", "resolution=16"],
    [*COMMON, "channels=32", "resolution=32"],
    [*COMMON, "channels=128", "resolution=16"],
    [*COMMON, "channels=64", "resolution=32"],
]

SPIN = """
import time as _time

_forward = ResBlock.forward


def _slowed(self, x, emb):
    began = _time.perf_counter()
    out = _forward(self, x, emb)
    until = _time.perf_counter() + {share} * (_time.perf_counter() - began)
    while _time.perf_counter() < until:
        pass
    return out


ResBlock.forward = _slowed
"""


class Line(Record, frozen=True, kw_only=True):
    """One comparison: the share that was spun in, its seconds, and the outcome."""

    slowdown: float
    seconds: float
    machine: str
    tolerance: float
    outcome: Compared


def main(
    slowdown: Annotated[float, typer.Option(min=0, help="Share of a step that is spun in.")] = 0.0,
    comparisons: Annotated[int, typer.Option(min=1)] = 200,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Lines are appended.")] = Path(
        "gate-rates.jsonl"
    ),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
) -> None:
    cells = plan([parse_arguments(axes) for axes in CELLS])
    asked = Plan(
        device="cpu",
        rule=named("gate-cpu").settings.rule(),
        seed=seed,
        threads=threads,
        memory_limit_bytes=None,
        cells=cells,
    )
    draw = random.Random(seed)
    words: Counter[str] = Counter()
    console = Console()
    with TemporaryDirectory() as scratch:
        sides = {
            name: _paths(Path(scratch, name), share)
            for name, share in (("base", 0.0), ("head", slowdown))
        }
        with opened(asked, sides, limit_s=300.0) as bed, output.open("ab") as file:
            base, head = bed.sides
            tolerance, _ = tolerance_here(bed.environment, RoundRule(), Path.cwd())
            for number in track(range(comparisons), console=console):
                task = bed.tasks[number % len(bed.tasks)]
                began = time.monotonic()
                comparison = Comparison(
                    [task],
                    lambda task: measure_pair(task, bed.truth(task), base, head, RoundRule(), draw),
                    tolerance,
                    draw,
                )
                (outcome,) = comparison.carry_out()
                words[outcome.verdict.word] += 1
                line = Line(
                    slowdown=slowdown,
                    seconds=time.monotonic() - began,
                    machine=bed.environment.machine,
                    tolerance=tolerance.relative,
                    outcome=outcome,
                )
                file.write(msgspec.json.encode(line) + b"\n")
                file.flush()
                if outcome.verdict.word in ("SLOW", "FAST"):
                    console.print(cell_name(task.cell), outcome.verdict)
    console.print(f"slowdown {slowdown:.0%}, tolerance {tolerance.relative:.1%}:", dict(words))


def _paths(folder: Path, share: float) -> list[Path]:
    """A copy of this project's packages, spinning or not; both sides are copies alike."""
    for package in ("reference", "kernels"):
        shutil.copytree(package_folder(package), folder / "tree" / package)
    shutil.copy(package_folder("bench").parent / "pyproject.toml", folder / "tree")
    if share:
        with (folder / "tree" / "kernels" / "blocks.py").open("a") as file:
            file.write(SPIN.format(share=share))
    (folder / "path").mkdir()
    return python_paths(folder / "tree", [], folder / "path")


if __name__ == "__main__":
    sys.exit(typer.run(main))
