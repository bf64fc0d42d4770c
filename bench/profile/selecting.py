"""The cells that a command line names: by the id of a row, or by axes that one cell has."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.checkout import checkout_around
from resblock_bench.bench.errors import UsageError, shortened
from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.measure.workload import unsupported
from resblock_bench.bench.records import Cell, cell_name
from resblock_bench.bench.runs.folder import CELLS, CELLS_BYTES
from resblock_bench.bench.units import counted

_ID = re.compile(r"[0-9a-f]{16}")
_MOST_NAMED = 3


class _Known(msgspec.Struct):
    """Of a row, what it is found by."""

    id: str
    axes: Cell


def selected(
    words: Sequence[str], arguments: Sequence[str], output: Path | None, start: Path
) -> list[Cell]:
    """One cell, or two to compare.

    words      an id each, or axes with spaces between
    arguments  axes of all, NAME=VALUES
    output     a run folder in which ids are looked for, with those of the checkout around `start`

    Raises UsageError, which names the nearest, for none, for more, and for what cannot be run.
    """
    cells: list[Cell] = []
    for word in words or [""]:
        if _ID.fullmatch(word.strip()):
            cells.append(_by_id(word.strip(), output, start))
        elif "=" in word or not word.strip():
            own = parse_arguments(word.split())
            cells += [item.cell for item in plan([{**parse_arguments(arguments), **own}])]
        else:
            raise UsageError(
                f"{shortened(word)!r} is neither a cell's id, 16 hexadecimal digits, nor axes: "
                "write them as 'channels=128 resolution=32 impl=fused'"
            )
    if len(cells) > 2 or not (words or arguments):
        raise UsageError(
            f"{counted(len(cells), 'cell')} were named, such as {_names(cells)}; one is profiled, "
            "or two side by side: name them by id, or give more axes, impl=fused or workload=model"
        )
    for cell in cells:
        why = unsupported(cell)
        if why is not None:
            raise UsageError(f"{cell_name(cell)} cannot be run: {why}")
    return cells


def _names(cells: Sequence[Cell]) -> str:
    return "; ".join(map(cell_name, cells[:_MOST_NAMED]))


def _by_id(id_: str, output: Path | None, start: Path) -> Cell:
    folders = [*([output] if output is not None else []), *_run_folders(start)]
    known = {row.id: row.axes for folder in folders for row in _rows(folder)}
    if id_ in known:
        return known[id_]
    nearest = difflib.get_close_matches(id_, known, n=_MOST_NAMED, cutoff=0.0)
    listed = ", ".join(f"{one} ({cell_name(known[one])})" for one in nearest)
    hint = f"the nearest of {len(known)} are {listed}" if known else "there are no rows"
    raise UsageError(
        f"no row of {counted(len(folders), 'run folder')} has the id {id_}: {hint}; name one, or a "
        "cell by its axes, or the run folder with --output"
    )


def _run_folders(start: Path) -> Iterable[Path]:
    found = (checkout_around(start) / "results" / "runs").glob(f"*/*/{CELLS}")
    return sorted(path.parent for path in found)


def _rows(folder: Path) -> Iterator[_Known]:
    """The rows that can be read: of a folder of another version, or one that is damaged, the ids
    of which serve no one, none."""
    try:
        lines = files.read(folder / CELLS, CELLS_BYTES).splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=_Known)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
