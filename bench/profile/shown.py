"""What `profile` prints: where the time of a step goes, its memory, and how two of them differ."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar, get_args

from rich.table import Table
from rich.text import Text

from resblock_bench.bench.records import cell_name
from resblock_bench.bench.units import MIB, counted, format_mib

from .events import StepStage
from .groups import Group
from .profiles import TRACE, Profile, ProfilePart

MOST_LINES = 12
"""Of modules, and of kernels."""
_LEAST_NAME = 12  # characters
_STAGES = get_args(StepStage)
T = TypeVar("T")


def shown(found: Profile) -> Iterator[Table | str]:
    """Tables and lines, in order."""
    yield f"{cell_name(found.cell)} on {found.device_name}: {step_words(found)}"
    yield attributed_words(found)
    yield _table("time by group", GROUP_HEADINGS, group_lines(found))
    yield _table("ms by module", MODULE_HEADINGS, module_lines(found))
    yield _table("ms by kernel", KERNEL_HEADINGS, _kernel_lines(found))
    if found.memory is not None:
        yield memory_words(found)
    yield from notes_of(found)


def notes_of(found: Profile) -> Iterator[str]:
    if found.left_out:
        yield f"{TRACE} has no room for {found.left_out:,} of the shortest events"
    yield from found.notes


def step_words(found: Profile) -> str:
    plain = statistics.median(found.plain_ns)
    over = (found.step_ns / plain - 1) * 100
    return (
        f"a step of {_ms(found.step_ns)} ms, the middle one of {len(found.profiled_ns)}; without a "
        f"profiler {_ms(plain)} ms, so recording it costs {over:+.1f} %"
    )


def attributed_words(found: Profile) -> str:
    shares = ((stage, found.attributed(stage)) for stage in _STAGES)
    parts = [f"{100 * share:.1f} % of the {stage}" for stage, share in shares if share is not None]
    return f"attributed to modules and operators: {', '.join(parts)}"


GROUP_HEADINGS = (
    "group", *_STAGES, "all ms", "%", "runs", "MiB", "GFLOP", "GB/s", "GFLOP/s", "roof %",
)  # fmt: skip
MODULE_HEADINGS = ("module", *_STAGES, "all ms")
KERNEL_HEADINGS = ("kernel", "group", "pass", "ms", "runs")


def group_lines(found: Profile) -> Iterator[list[str]]:
    """A line a group, the longest first, and their sum. `roof` is the share of the time that its
    bytes, or its matrix operations, need at the machine's rates."""
    for group, _ in found.total(lambda part: part.group).most_common():
        yield _group_line(group, [part for part in found.parts if part.group == group], found)
    yield _group_line("all", found.parts, found)


def _group_line(name: str, parts: Sequence[ProfilePart], found: Profile) -> list[str]:
    ns = sum(part.ns for part in parts)
    moved, flops = sum(part.bytes for part in parts), sum(part.flops for part in parts)
    roof = least_ns(found, moved, sum(part.matrix_flops for part in parts))
    stages = (sum(part.ns for part in parts if part.stage == stage) for stage in _STAGES)
    return [
        name,
        *(_ms(one) if one else "–" for one in stages),
        _ms(ns),
        f"{100 * ns / found.step_ns:.1f}",
        f"{sum(part.launches for part in parts):,}",
        format_mib(moved) if moved else "–",
        f"{flops / 1e9:,.3g}" if flops else "–",
        f"{moved / ns:,.3g}" if moved and ns else "–",
        f"{flops / ns:,.3g}" if flops and ns else "–",
        f"{100 * roof / ns:.0f}" if roof and ns else "–",
    ]


def least_ns(found: Profile, moved: int, matrix_flops: int) -> float | None:
    """What the machine needs at its ceilings; None where they are unknown."""
    if found.ceilings is None:
        return None
    rate = found.ceilings.matrix_flops_per_s[found.cell.dtype]
    return 1e9 * max(moved / found.ceilings.copy_bytes_per_s, matrix_flops / rate)


def module_lines(found: Profile) -> Iterator[list[str]]:
    """The modules that take longest, cut to two parts such as input_blocks.3, the others together,
    and their sum."""
    by = found.total(lambda part: (module_name(part.module), part.stage))
    longest = [name for name, _ in found.total(lambda p: module_name(p.module)).most_common()]
    lines = [(name, [name]) for name in longest[:MOST_LINES]]
    rest = longest[MOST_LINES:]
    if rest:
        lines.append((f"{counted(len(rest), 'other')}", rest))
    for title, names in [*lines, ("all", longest)]:
        times = [sum(by[name, stage] for name in names) for stage in _STAGES]
        yield [title, *(_ms(one) if one else "–" for one in times), _ms(sum(times))]


def module_name(module: str | None) -> str:
    if module is None:
        return "(outside: loss, update, gaps)"
    return ".".join(module.split(".")[:2]) or "(the whole itself)"


def _kernel_lines(found: Profile) -> Iterator[list[str]]:
    for one in found.kernels[:MOST_LINES]:
        yield [one.name, one.group, one.stage, _ms(one.ns), f"{one.launches:,}"]
    rest = found.kernels[MOST_LINES:]
    if rest:
        ns, runs = sum(one.ns for one in rest), sum(one.launches for one in rest)
        yield [counted(len(rest), "other"), "", "", _ms(ns), f"{runs:,}"]


def memory_words(found: Profile) -> str:
    memory = found.memory
    assert memory is not None
    parts = [f"{name} {format_mib(count)}" for name, count in memory.peak.items() if count]
    held = [f"{m or 'the whole itself'} {format_mib(n)}" for m, n in list(memory.held.items())[:3]]
    where = module_name(memory.peak_module)
    return (
        f"peak {format_mib(memory.peak_bytes)} MiB, in the {memory.peak_stage} of {where}: "
        f"{', '.join(parts)}; most is held by {', '.join(held) or 'nobody'}"
    )


def compared(one: Profile, other: Profile) -> Iterator[Table | str]:
    """Two profiles side by side: where the difference comes from, in ms and MiB."""
    yield f"A: {cell_name(one.cell)}: {step_words(one)}"
    yield f"B: {cell_name(other.cell)}: {step_words(other)}"
    headings = ("", "A", "B", "B - A")
    yield _table("ms by group", headings, _differences(times(one), times(other), _ms))
    moved = [found.total(lambda part: part.group, "bytes") for found in (one, other)]
    if one.operators and other.operators:
        yield _table("MiB moved by group", headings, _differences(moved[0], moved[1], _mib))
    if one.memory is not None and other.memory is not None:
        peaks = _differences(one.memory.peak, other.memory.peak, _mib)
        yield _table("MiB at the peak", headings, peaks)
    yield from (
        f"{name}: {note}" for name, found in (("A", one), ("B", other)) for note in notes_of(found)
    )


def times(found: Profile) -> dict[Group, int]:
    return found.total(lambda part: part.group)


def _differences(
    one: dict[T, int], other: dict[T, int], words: Callable[[float], str]
) -> Iterator[list[str]]:
    """A line each, the largest difference first, and their sums."""

    def change(name: T) -> int:
        return other.get(name, 0) - one.get(name, 0)

    names = sorted({**one, **other}, key=lambda name: -abs(change(name)))
    for name in names:
        if one.get(name) or other.get(name):
            both = words(one.get(name, 0)), words(other.get(name, 0))
            yield [str(name), *both, _signed(change(name), words)]
    sums = sum(one.values()), sum(other.values())
    yield ["all", *map(words, sums), _signed(sums[1] - sums[0], words)]


def _signed(value: int, words: Callable[[float], str]) -> str:
    return f"{'-' if value < 0 else '+'}{words(abs(value))}"


def _ms(ns: float) -> str:
    ms = ns / 1e6
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}"


def _mib(count: float) -> str:
    return f"{count / MIB:,.2f}"


def _table(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        words = number == 0 or heading in ("group", "pass")
        width = _LEAST_NAME if number == 0 else None
        justify: Literal["left", "right"] = "left" if words else "right"
        table.add_column(heading, justify=justify, no_wrap=True, min_width=width)
    for line in lines:
        table.add_row(*map(Text, line))
    return table
