"""The axes of the grid: their names, what values they take, and how `-a NAME=VALUES` is read.

VALUES is a comma list; an item may be a range with both ends included where the step hits them:
`[16:128:x2]` is 16,32,64,128 and `[16:64:+16]` is 16,32,48,64.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from resblock_bench.bench import records
from resblock_bench.bench.errors import UsageError, shortened, unknown
from resblock_bench.bench.measure import implementations
from resblock_bench.bench.offers import check_offers
from resblock_bench.reference import PUBLISHED

AxisValue = str | int | float
Selection = Mapping[str, tuple[AxisValue, ...]]
"""The values asked for on each axis; an axis that is absent takes its default."""

MOST_CELLS = 100_000
"""Of one plan: more than a year of measuring."""
_LARGEST = 2**24
_RANGE = re.compile(r"\[(\d{1,18}):(\d{1,18}):([x+])(\d{1,18})\]")
_ITEM = re.compile(r"\[[^\]]*\]?|[^,\[]+")


@dataclass(frozen=True)
class Axis:
    """One axis. `choices` is empty for a number, from `least` to `most` where it is an integer."""

    name: str
    kind: Literal["choice", "int", "float"]
    default: tuple[AxisValue, ...]
    help: str
    choices: tuple[AxisValue, ...] = ()
    least: int = 1
    most: int = _LARGEST

    def allowed(self) -> str:
        if self.choices:
            return ", ".join(str(choice) for choice in self.choices)
        return (
            "0 ≤ value < 1"
            if self.kind == "float"
            else f"integers from {self.least} to {self.most}"
        )


def _choice(name: str, kind: Any, help: str, default: tuple[AxisValue, ...]) -> Axis:
    return Axis(name, "choice", default, help, choices=get_args(kind))


def axes() -> dict[str, Axis]:
    """Every axis by name, in the order in which the grid is walked (the last runs fastest)."""
    _check_implementations()
    found = [
        _choice(
            "workload", records.WorkloadKind, "a block, a whole model, all its blocks", ("block",)
        ),
        Axis("model", "choice", (), "published model, or a config.json", tuple(PUBLISHED)),
        Axis("dims", "int", (2,), "spatial dimensions", (1, 2, 3)),
        Axis("resolution", "int", (32,), "spatial extent at the block's input"),
        Axis("channels", "int", (128,), "input channels, a multiple of 32"),
        Axis("out_channels", "int", (), "output channels, as many as channels by default"),
        _choice("conditioning", records.Conditioning, "embedding", ("scale_shift",)),
        Axis("dropout", "float", (0.0,), "dropout probability; a model brings its own"),
        Axis("batch", "int", (8,), "images a step"),
        Axis("microbatch", "int", (), "images that a model trains on at once, all by default"),
        _choice("dtype", records.DType, "dtype of convolutions and activations", ("fp32",)),
        _choice("layout", records.Layout, "memory format", ("nchw",)),
        _choice("mode", records.Mode, "what a step runs", ("train",)),
        _choice("checkpoint", records.Checkpoint, "activation checkpointing", ("none",)),
        Axis(
            "impl",
            "choice",
            ("reference", "fused"),
            "implementation",
            tuple(implementations.IMPLEMENTATIONS),
        ),
    ]
    return {axis.name: axis for axis in found}


@functools.cache
def _check_implementations() -> None:
    """Raises InvalidError where one of another package hides behind a name that is taken."""
    check_offers("resblock_bench.implementations", implementations.OWN)


def models() -> tuple[AxisValue, ...]:
    """The published models made of this suite's block; EDM's are made of another one."""
    return tuple(name for name, config in PUBLISHED.items() if not config.family.startswith("edm"))


def is_config(model: str) -> bool:
    """Whether a value of the axis `model` is a file: the config.json of a model of diffusers."""
    return model.endswith(".json")


def parse_arguments(arguments: Iterable[str]) -> dict[str, tuple[AxisValue, ...]]:
    """The selection in repeated `NAME=VALUES` arguments."""
    selection: dict[str, tuple[AxisValue, ...]] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise UsageError(f"{argument!r} is not an axis: write NAME=VALUES, such as dtype=bf16")
        name = name.strip()
        if name in selection:
            raise UsageError(f"axis {name!r} was given twice: join its values with commas")
        selection[name] = parse_values(name, text)
    return selection


def parse_values(name: str, given: object) -> tuple[AxisValue, ...]:
    """The values of one axis, from the command line's text or from TOML's scalar or list.

    Repeated values are dropped; the order given is kept.
    """
    known = axes()
    if name not in known:
        raise unknown("axis", name, known)
    items: list[object] = list(given) if isinstance(given, list) else [given]
    values: list[AxisValue] = []
    for item in items:
        if isinstance(item, str):
            for part in _split(known[name], item):
                values += _parse_item(known[name], part)
        else:
            values += _parse_item(known[name], item)
    if not values:
        raise UsageError(f"axis {name!r} was given no value: it takes {known[name].allowed()}")
    return tuple(dict.fromkeys(values))


def _split(axis: Axis, text: str) -> list[str]:
    """The items of a comma list, ranges kept whole."""
    parts = [part.strip() for part in _ITEM.findall(text)]
    if "".join(parts).replace(" ", "") != text.replace(",", "").replace(" ", ""):
        raise _bad_value(axis, text)
    return [part for part in parts if part]


def _parse_item(axis: Axis, item: object) -> list[AxisValue]:
    if isinstance(item, str) and item.startswith("["):
        return list(_parse_range(axis, item))
    return [_parse_value(axis, item)]


def _parse_range(axis: Axis, text: str) -> list[int]:
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if axis.kind != "int" or match is None:
        raise UsageError(
            f"{text!r} is not a range for axis {axis.name!r}: an integer axis takes "
            "[first:last:xFACTOR] or [first:last:+STEP], such as [16:128:x2]"
        )
    first, last, step = int(match[1]), int(match[2]), int(match[4])
    if first > last or first < 1 or step < (2 if match[3] == "x" else 1):
        raise UsageError(
            f"range {text!r} of axis {axis.name!r} does not ascend: it needs "
            "1 ≤ first ≤ last, and a factor of at least 2 or a step of at least 1"
        )
    _parse_value(axis, last)  # refused before all that lies between is written down
    if match[3] == "+" and (last - first) // step >= MOST_CELLS:
        raise UsageError(
            f"range {text!r} of axis {axis.name!r} has {(last - first) // step + 1:,} values, and "
            f"a plan takes {MOST_CELLS:,} cells: widen the step"
        )
    values = [first]
    while (following := values[-1] * step if match[3] == "x" else values[-1] + step) <= last:
        values.append(following)
    for value in values:
        _parse_value(axis, value)
    return values


def _parse_value(axis: Axis, item: object) -> AxisValue:
    if axis.kind == "choice":
        text = str(item)
        if text not in axis.choices and not (axis.name == "model" and is_config(text)):
            files = ["the config.json of a model of diffusers"] if axis.name == "model" else []
            raise unknown(f"value of axis {axis.name!r}:", text, [*map(str, axis.choices), *files])
        return text
    try:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise ValueError
        value = int(str(item)) if axis.kind == "int" else float(item)
    except ValueError:
        raise _bad_value(axis, item) from None
    inside = value in axis.choices if axis.choices else axis.least <= value <= axis.most
    if axis.kind == "float":
        inside = 0 <= value < 1
    if not inside:
        raise _bad_value(axis, item)
    return value


def _bad_value(axis: Axis, item: object) -> UsageError:
    return UsageError(
        f"axis {axis.name!r} does not take {shortened(str(item))!r}: it takes {axis.allowed()}; "
        f"write them as a comma list"
    )
