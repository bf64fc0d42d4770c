"""Parts of rows that were not measured."""

from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import Ratio

NOTHING = {"median_ms": None, "throughput_images_per_s": None, "memory": None, "correctness": None}
"""What a row of a cell without a measurement has not."""

CALM = conditions(Reading(t_s=0.0), Reading(t_s=1.0), source="test", images=1, threads=1)
HOT = conditions(
    Reading(t_s=0.0, throttled_us={"heat": 0}), Reading(t_s=1.0, throttled_us={"heat": 9}),
    source="test", images=1, threads=1,
)  # fmt: skip


def within(value: float, share: float = 0.1) -> Ratio:
    """A ratio with an interval."""
    return Ratio(value=value, low=value * (1 - share), high=value * (1 + share))
