"""What a gate has to say of each thing that is not as expected, and the exit code that follows.

    wrong         a result is further from float64 than its limit               5
    regression    slower, hungrier, less exact or costlier than expected         1
    invalid       missing, not a number, crashed, or impossible                  3
    changed       not as expected, and what it means cannot be known here        4
    better        better than expected: what is expected is to be saved again    4
    inconclusive  measured, but the noise allows no verdict                      4
    note          for information                                                0

The code of several findings is that of the first level in this order.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from resblock_bench.bench import exitcodes
from resblock_bench.bench.records import Record

Level = Literal["wrong", "regression", "invalid", "changed", "better", "inconclusive", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)

_CODES: dict[Level, int] = {
    "wrong": exitcodes.WRONG,
    "regression": exitcodes.REGRESSION,
    "invalid": exitcodes.INCOMPLETE,
    "changed": exitcodes.INCONCLUSIVE,
    "better": exitcodes.INCONCLUSIVE,
    "inconclusive": exitcodes.INCONCLUSIVE,
    "note": exitcodes.OK,
}


class Finding(Record, frozen=True):
    """One thing that is not as expected.

    `part` is the check that found it, `subject` and `entry` what it is about, `text` a sentence
    with what was expected, what was found and what to do.
    """

    part: str
    level: Level
    subject: str
    entry: str | None
    text: str


def of_part(part: str, level: Level, text: str) -> Finding:
    """A finding about a part as a whole."""
    return Finding(part, level, part, None, text)


def is_of_part(finding: Finding) -> bool:
    """Whether it is about a part as a whole."""
    return finding.subject == finding.part


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by level, otherwise in the order given."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def exit_code(findings: Iterable[Finding]) -> int:
    """The code of the worst finding; OK where there is none."""
    worst = worst_first(findings)
    return _CODES[worst[0].level] if worst else exitcodes.OK
