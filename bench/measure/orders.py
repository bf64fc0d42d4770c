"""What a variant's process is told while it takes turns with others, and what it answers; JSON."""

import msgspec

from resblock_bench.bench.records import StopRule

from .telemetry import Reading


class Redraw(msgspec.Struct, tag=True):
    """Other inputs, in the same memory."""


class Burst(msgspec.Struct, tag=True):
    """Take samples for so many seconds, at least one and at most `most`."""

    seconds: float
    most: int | None = None


class Read(msgspec.Struct, tag=True):
    """Read the machine's counters."""


class Finish(msgspec.Struct, tag=True):
    """No more bursts: check the last results, and reply with the row."""

    stop_rule: StopRule


Order = Redraw | Burst | Read | Finish


class Ready(msgspec.Struct, tag=True):
    """Right, its memory measured, and warm; then after every redrawing."""


class Samples(msgspec.Struct, tag=True):
    """`energy_j` is what the device took meanwhile, None where it does not say."""

    samples_ms: list[float]
    energy_j: float | None = None


class Counters(msgspec.Struct, tag=True):
    source: str
    reading: Reading


Response = Ready | Samples | Counters
