"""The rows of a run in other formats, beside cells.jsonl: CSV, Parquet, Markdown.

In CSV and Parquet a cell is a row. Its columns follow from the schema alone, so that the files of
two runs always fit together: nested structs are flattened as `axes.batch` or `memory.peak_bytes`,
and a missing struct leaves its columns empty. Numbers are written in full. Lists are lists in
Parquet and JSON text in CSV; mappings, whose keys vary, are JSON text in both.
"""

import csv
import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from resblock_bench.bench import files
from resblock_bench.bench.errors import UsageError, unknown
from resblock_bench.bench.markdown import escaped, table
from resblock_bench.bench.records import Row, site_name

from .folder import Run
from .table import HEADINGS, by_site, notes_of, problems, source_of, summary, variant_line

STEM = "cells"


def parse_formats(text: str) -> list[str]:
    """The formats in a comma list. Raises UsageError for one that is unknown or cannot be had."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
        if name == "parquet":
            _require_pyarrow()
    return names


def export(run: Run, formats: Iterable[str]) -> list[Path]:
    """Write cells.FORMAT into the run's folder for each format, each file whole or not at all.

    Raises UsageError where the folder cannot be written or a format needs a missing package.
    """
    contents = {run.folder / f"{STEM}.{name}": FORMATS[name](run) for name in formats}
    for path, content in contents.items():
        files.write(path, content, "make its folder writable")
    return list(contents)


def _require_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            "format 'parquet' needs the package pyarrow, which is not installed: "
            "pip install 'resblock-bench[parquet]', or choose another format"
        )


def _columns() -> list[tuple[tuple[str, ...], inspect.Type]]:
    """Path and type of every leaf of the schema."""
    return list(_leaves(inspect.type_info(Row), ()))


def _leaves(
    kind: inspect.Type, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], inspect.Type]]:
    kind = _present(kind)
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            yield from _leaves(field.type, (*path, field.encode_name))
    else:
        yield path, kind


def _present(kind: inspect.Type) -> inspect.Type:
    """The type of a value that is not null, without its constraints' wrappers."""
    if isinstance(kind, inspect.Metadata):
        return _present(kind.type)
    if isinstance(kind, inspect.UnionType):
        (kind,) = (one for one in kind.types if not isinstance(one, inspect.NoneType))
        return _present(kind)
    return kind


def _leaf(row: Row, path: tuple[str, ...]) -> Any:
    value: Any = row
    for name in path:
        value = None if value is None else getattr(value, name)
    return value


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _csv(run: Run) -> bytes:
    columns = _columns()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(".".join(path) for path, _ in columns)
    for row in run.rows:
        values = (_leaf(row, path) for path, _ in columns)
        # The writer puts a float down as repr does, with all the digits that tell it apart.
        writer.writerow(_json(v) if isinstance(v, list | tuple | dict) else v for v in values)
    return text.getvalue().encode()


def _parquet(run: Run) -> bytes:
    _require_pyarrow()
    import pandas
    import pyarrow
    from pyarrow import parquet

    series, fields = {}, []
    for path, kind in _columns():
        name, values = ".".join(path), [_leaf(row, path) for row in run.rows]
        arrow, dtype = _parquet_types(kind)
        if isinstance(kind, inspect.DictType):
            values = [_json(value) for value in values]
        # Pandas' nullable types: an integer column with a null in it stays one of integers.
        series[name] = pandas.Series(values, dtype=dtype)
        fields.append(pyarrow.field(name, arrow))
    frame = pandas.DataFrame(series)
    table = pyarrow.Table.from_pandas(frame, schema=pyarrow.schema(fields), preserve_index=False)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _parquet_types(kind: inspect.Type) -> tuple[Any, str]:
    """How a leaf is stored, in Arrow's and in pandas' terms."""
    import pyarrow

    if isinstance(kind, inspect.BoolType):
        return pyarrow.bool_(), "boolean"
    if isinstance(kind, inspect.FloatType):
        return pyarrow.float64(), "Float64"
    if isinstance(kind, inspect.ListType):
        return pyarrow.list_(_parquet_types(_present(kind.item_type))[0]), "object"
    if isinstance(kind, inspect.TupleType):
        return pyarrow.list_(_parquet_types(_present(kind.item_types[0]))[0]), "object"
    numbers = isinstance(kind, inspect.LiteralType) and isinstance(kind.values[0], int)
    if numbers or isinstance(kind, inspect.IntType):
        return pyarrow.int64(), "Int64"
    return pyarrow.string(), "string"


def _markdown(run: Run) -> bytes:
    """A table for a comment on a change: a line a cell, then the summary and what went wrong."""
    notes = notes_of(run.rows)
    cells = [
        [
            site_name(site),
            f"{site.dtype} {site.layout} {site.mode}",
            *variant_line(row, notes.get(row.axes)),
        ]
        for site, members in by_site(run.rows).items()
        for row in members
    ]
    lines = table(["block", "run", "variant", *HEADINGS[1:]], cells, words=3)
    lines += ["", escaped(summary(run.rows)), ""]
    lines += [f"- {escaped(problem)}" for problem in problems(run.rows)]
    if run.rows:
        lines += ["", f"<sub>{escaped(source_of(run))}</sub>"]
    return ("\n".join(lines) + "\n").encode()


FORMATS: dict[str, Callable[[Run], bytes]] = {
    "csv": _csv,
    "parquet": _parquet,
    "md": _markdown,
}
