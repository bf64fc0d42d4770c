"""What a side of a comparison is told, and what it answers; JSON."""

import msgspec

from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import Status

ADDR_NO_RANDOMIZE = 0x0040000  # sys/personality.h


class Open(msgspec.Struct, tag=True):
    """Begin a round: check the task's cell against its truth, a file, and warm it up."""

    task: Task
    truth: str


class Burst(msgspec.Struct, tag=True):
    """Take samples for so many seconds, at least one."""

    seconds: float


class Read(msgspec.Struct, tag=True):
    """Read the machine's counters."""


class Close(msgspec.Struct, tag=True):
    """End the round's process."""


Order = Open | Burst | Read | Close


class Up(msgspec.Struct, tag=True):
    """The server has imported everything.

    code              the digest of the code that it has imported
    fixed_addresses   whether its memory lies where that of the other side does
    """

    code: str
    fixed_addresses: bool


class Opened(msgspec.Struct, tag=True):
    """The outcome of the check; anything but "ok" ends the round's process."""

    status: Status
    reason: str | None


class Samples(msgspec.Struct, tag=True):
    samples_ms: list[float]


class Counters(msgspec.Struct, tag=True):
    source: str
    reading: Reading


class Ended(msgspec.Struct, tag=True):
    """A round's process has ended, as Popen.returncode would say it."""

    exit_code: int


Reply = Up | Opened | Samples | Counters | Ended
