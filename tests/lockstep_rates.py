"""How often the interval of a ratio misses what it should hold, where that is known.

    python tests/lockstep_rates.py --blocks 200 --output rates.jsonl
    python tests/lockstep_rates.py --blocks 100 --slowdown 0.05 --output rates.jsonl
    python tests/lockstep_rates.py --blocks 200 --load --output rates.jsonl

Measures blocks of two variants as `run` does: the reference, and either the same code under another
name or the same with that share of its own time spun in. With --load another program takes one CPU
meanwhile. Appends a line a block and says how often the 95 % interval missed, and its half width.
These rates are measured, not assumed: how independent rounds are depends on the machine.
"""

import itertools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from support.cells import TINY

from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.timing import DEFAULT_RULE
from resblock_bench.bench.records import Cell, Ratio, Record, Status

FAULTS = Path(__file__).parent / "faults"
SIZES = [(32, 8), (32, 16), (64, 8), (64, 16), (32, 32), (128, 8), (128, 16), (64, 32)]
TWINS = {0.0: "twin", 0.05: "slower"}


class Line(Record, frozen=True, kw_only=True):
    """A block: the share that was spun in, and what its rounds said."""

    slowdown: float
    load: bool
    machine: str
    threads: int
    cell: Cell
    status: Status
    reason: str | None
    ratio: Ratio | None
    rounds: int
    median_ms: float | None
    wall_s: float
    disturbances: list[str]


def main(
    blocks: Annotated[int, typer.Option(min=1)] = 200,
    slowdown: Annotated[float, typer.Option(help="0 or 0.05.")] = 0.0,
    load: Annotated[bool, typer.Option("--load", help="Keep one CPU busy.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Lines are appended.")] = Path(
        "lockstep-rates.jsonl"
    ),
) -> None:
    # Here, since the process server takes its path from this process.
    sys.path.insert(0, str(FAULTS))
    from resblock_bench.bench.sweep.engines import LocalEngine

    engine = LocalEngine("cpu", threads=threads, limit_s=300.0)
    console, lines = Console(), []
    command = [sys.executable, "-c", "while True: pass"]
    other = subprocess.Popen(command) if load else None
    try:
        found = engine.survey()
        sizes = itertools.cycle(SIZES)
        with output.open("ab") as file:
            for number in track(range(blocks), console=console):
                channels, resolution = next(sizes)
                cell = msgspec.structs.replace(
                    TINY,
                    channels=channels,
                    out_channels=channels,
                    resolution=resolution,
                    emb_channels=128,
                    mode="inference",
                )
                task = Task(
                    cell=cell,
                    multiplicity=1,
                    attempt=1,
                    device="cpu",
                    rule=DEFAULT_RULE,
                    seed=number,
                    environment=found,
                    memory_limit_bytes=None,
                    folder=None,
                )
                twin = msgspec.structs.replace(cell, impl=TWINS[slowdown])
                pair = [task, msgspec.structs.replace(task, cell=twin)]
                _, row = engine.submit(pair).result()
                gone = row.conditions.disturbances if row.conditions else []
                line = Line(
                    slowdown=slowdown,
                    load=load,
                    machine=machine_name(),
                    threads=threads,
                    cell=cell,
                    status=row.status,
                    reason=row.reason,
                    ratio=row.ratio,
                    rounds=len(row.rounds or ()),
                    median_ms=row.median_ms,
                    wall_s=row.wall_s or 0.0,
                    disturbances=gone,
                )
                lines.append(line)
                file.write(msgspec.json.encode(line) + b"\n")
                file.flush()
    finally:
        if other is not None:
            other.kill()
        engine.close()
    console.print(summary(lines, slowdown))


def summary(lines: list[Line], slowdown: float) -> str:
    """How often the interval missed the truth, and how wide it is."""
    ratios = [line.ratio for line in lines if line.ratio is not None and line.ratio.low is not None]
    truth = 1 / (1 + slowdown)
    missed = sum(not r.low <= truth <= r.high for r in ratios)
    holds_one = sum(r.low <= 1 <= r.high for r in ratios)
    widths = [(r.high - r.low) / 2 / r.value for r in ratios]
    quiet = [line for line in lines if not line.disturbances]
    return (
        f"{len(ratios)} of {len(lines)} blocks have an interval; it misses {truth:.3f} in "
        f"{missed}, holds 1 in {holds_one}; half width {statistics.median(widths):.2%} in the "
        f"median, at most {max(widths):.2%}; ratios {min(r.value for r in ratios):.3f} to "
        f"{max(r.value for r in ratios):.3f}; {len(quiet)} undisturbed; rounds "
        f"{statistics.median(line.rounds for line in lines):g} in the median"
    )


if __name__ == "__main__":
    sys.exit(typer.run(main))
