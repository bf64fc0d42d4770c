"""How often the timing gate cries wolf, and how often it sees a real slowdown.

    python tests/gate_rates.py --preset gate-cpu --runs 24 --output rates.jsonl
    python tests/gate_rates.py --slowdown 0.05 --runs 25 --output rates.jsonl

Compares the kernels with themselves, or with a copy whose block spins for that share of its own
time. Every run is what `compare --base` does, from starting the sides to confirming draws, and
appends a line a cell: what was spun in, and the outcome. A run of CELLS takes one to two minutes on
a machine that does nothing else.
These rates are measured, not assumed: how much drift pairs cancel depends on the machine.
"""

import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track

from resblock_bench.bench.checkout import package_folder
from resblock_bench.bench.compare.compare import BaseRequest, in_lockstep
from resblock_bench.bench.compare.source_tree import python_paths
from resblock_bench.bench.compare.verdict import Verdict
from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.grid.presets import named
from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.records import Cell, Record, Status, cell_name

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
    """A cell of one run: the share that was spun in, and the outcome.

    log_ratios   of the rounds, those of the confirming draw last
    disturbed    rounds that did not count
    """

    slowdown: float
    run: int
    machine: str
    tolerance: float
    cell: Cell
    verdict: Verdict
    log_ratios: list[float]
    disturbed: int
    failed: tuple[Status, str] | None


def main(
    slowdown: Annotated[float, typer.Option(min=0, help="Share of a step that is spun in.")] = 0.0,
    preset: Annotated[str | None, typer.Option(help="Its cells. Default: CELLS.")] = None,
    runs: Annotated[int, typer.Option(min=1)] = 25,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Lines are appended.")] = Path(
        "gate-rates.jsonl"
    ),
) -> None:
    gate = named("gate-cpu")
    grids = named(preset).grids if preset else [parse_arguments(axes) for axes in CELLS]
    asked = Plan(
        device="cpu",
        rule=gate.settings.rule(),
        seed=0,
        threads=1,
        memory_limit_bytes=None,
        cells=plan(grids),
    )
    words: Counter[str] = Counter()
    console = Console()
    with TemporaryDirectory() as scratch, output.open("ab") as file:
        sides = {
            name: spinning(Path(scratch, name), share)
            for name, share in (("base", 0.0), ("head", slowdown))
        }
        for run in track(range(runs), console=console):
            request = BaseRequest(
                base="base",
                plan=msgspec.structs.replace(asked, seed=run),
                start=Path.cwd(),
                timeout_s=300.0,
            )
            outcome = in_lockstep(request, sides, Console(quiet=True))
            if outcome.ended is not None:
                raise typer.Exit(3)
            for item in outcome.items:
                words[item.failed[0] if item.failed else item.verdict.word] += 1
                line = Line(
                    slowdown=slowdown,
                    run=run,
                    machine=machine_name(),
                    tolerance=outcome.tolerance.relative,
                    cell=item.cell,
                    verdict=item.verdict,
                    log_ratios=[round(taken.log_ratio, 5) for taken in item.rounds],
                    disturbed=len(item.disturbed),
                    failed=item.failed,
                )
                file.write(msgspec.json.encode(line) + b"\n")
                if item.verdict.word in ("SLOW", "FAST"):
                    console.print(cell_name(item.cell), item.verdict)
            file.flush()
    console.print(f"slowdown {slowdown:.0%}:", dict(words))


def spinning(folder: Path, share: float) -> list[Path]:
    """The Python path of a copy of this project's packages, spinning or not: both sides are copies
    alike."""
    for package in ("reference", "kernels"):
        shutil.copytree(package_folder(package), folder / "tree" / package)
    shutil.copy(package_folder("bench").parent / "pyproject.toml", folder / "tree")
    if share:
        with (folder / "tree" / "kernels" / "blocks.py").open("a") as file:
            file.write(SPIN.format(share=share))
    (folder / "path").mkdir()
    return python_paths(folder.name, folder / "tree", [], folder / "path")


if __name__ == "__main__":
    sys.exit(typer.run(main))
