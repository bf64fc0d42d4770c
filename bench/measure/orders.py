"""What a variant's process is told while it takes turns with others, and what it answers; JSON."""

import msgspec

from resblock_bench.bench.records import StopRule

from .telemetry import Reading


class Redraw(msgspec.Struct, tag=True):
    """Other inputs, and a step with them that is not told: what others' turns have left, and memory
    that is new, is no part of a burst."""


class Burst(msgspec.Struct, tag=True):
    """Take samples for so many seconds, at least one and at most `most`."""

    seconds: float
    most: int | None = None


class Read(msgspec.Struct, tag=True):
    """Read the machine's counters."""


class ReadEnergy(msgspec.Struct, tag=True):
    """Read the device's energy alone. Not within a burst: a GPU's driver takes 5 ms to say."""


class Finish(msgspec.Struct, tag=True):
    """No more bursts: check the last results, and reply with the row."""

    stop_rule: StopRule


Order = Redraw | Burst | Read | ReadEnergy | Finish


class Ready(msgspec.Struct, tag=True):
    """Right, its memory measured, and warm; then whenever it is redrawn."""


class Samples(msgspec.Struct, tag=True):
    samples_ms: list[float]


class Counters(msgspec.Struct, tag=True):
    source: str
    reading: Reading


class Energy(msgspec.Struct, tag=True):
    """What the device has taken since some time, None where it does not say."""

    energy_j: float | None


Response = Ready | Samples | Counters | Energy
