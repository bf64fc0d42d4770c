"""What figures show of a row, and where its memory ran out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resblock_bench.bench.records import OOM_EXPECTED, Cell, Row
from resblock_bench.bench.units import MIB

from .folder import Run
from .table import undisturbed


@dataclass(frozen=True)
class Quantity:
    """What a figure shows of a row.

    value     None where the row has no such number
    interval  of it; None where it has none
    ratio     to the reference, from both rows, as text; None where none can be told
    shaken    whether a disturbed machine makes it doubtful
    has_wall  whether out of memory is a limit of it
    """

    name: str
    title: str
    label: str
    value: Callable[[Row], float | None]
    interval: Callable[[Row], tuple[float, float] | None]
    ratio: Callable[[Row, Row | None], str | None]
    shaken: bool
    has_wall: bool

    def of(self, row: Row) -> float | None:
        """Only a cell that is right, and ran to its end, has numbers to show."""
        return self.value(row) if row.status == "ok" else None

    def doubtful(self, row: Row) -> bool:
        return self.shaken and not undisturbed(row)


def _throughput_interval(row: Row) -> tuple[float, float] | None:
    if row.ci_low_ms is None or row.ci_high_ms is None:
        return None
    return row.axes.batch / row.ci_high_ms * 1e3, row.axes.batch / row.ci_low_ms * 1e3


def _speed_ratio(row: Row, reference: Row | None) -> str | None:
    ratio = row.ratio
    if ratio is None or not undisturbed(row):
        return None
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}×"
    return f"{ratio.value:.2f}× ±{(ratio.high - ratio.low) / 2:.2f}"


def _peak_mib(row: Row) -> float | None:
    return row.memory.peak_above_baseline_bytes / MIB if row.memory else None


def _peak_ratio(row: Row, reference: Row | None) -> str | None:
    if reference is None or reference.status != "ok":
        return None
    own, other = _peak_mib(row), _peak_mib(reference)
    return f"{own / other:.2f}×" if own is not None and other else None


QUANTITIES = (
    Quantity(
        "throughput",
        "Throughput of",
        "images / s\n(log scale; more is better)",
        lambda row: row.throughput_images_per_s,
        _throughput_interval,
        _speed_ratio,
        shaken=True,
        has_wall=False,
    ),
    Quantity(
        "memory",
        "Peak memory of",
        "MiB above parameters and inputs\n(log scale; less is better)",
        _peak_mib,
        lambda row: None,
        _peak_ratio,
        shaken=False,
        has_wall=True,
    ),
)


def subject_of(run: Run) -> str:
    """What the rows of a figure are of."""
    names = {"block": "one residual block", "model": "a whole model"}
    return names.get(run.rows[0].axes.workload, "all residual blocks of a model")


def ran_out(row: Row) -> bool:
    """Whether memory ran out, or would have: a smaller cell of the series could not run either."""
    return row.status == "oom" or is_expected(row)


def is_expected(row: Row) -> bool:
    return row.status == "skipped" and (row.reason or "").startswith(OOM_EXPECTED)


def walls(run: Run) -> dict[Cell, float]:
    """The MiB of the limit that each cell without enough memory ran into, where known.

    A row names its own limit; failing that it is the whole of the GPU's memory, or for a cell that
    was never started the lowest limit that others ran into.
    """
    whole = run.environment.gpu_memory_bytes
    known: dict[Cell, float] = {}
    beyond = [row for row in run.rows if ran_out(row)]
    for row in beyond:
        limit = row.memory_limit_bytes or (whole if row.contract.device == "cuda" else None)
        if limit:
            known[row.axes] = limit / MIB
    if known:
        lowest = min(known.values())
        known |= {row.axes: lowest for row in beyond if is_expected(row) and row.axes not in known}
    return known


def note_of(run: Run, quantity: Quantity, wall: Mapping[Cell, float]) -> str:
    """What a figure's marks mean."""
    notes = []
    if wall:
        notes.append("×: out of memory; the limit is on everything, parameters and inputs included")
        if any(is_expected(row) for row in run.rows):
            notes.append("pale ×: not started, as a smaller cell ran out")
    if any(quantity.doubtful(row) for row in run.rows):
        notes.append("hollow: measured while the machine did other things")
    return "; ".join(notes)
