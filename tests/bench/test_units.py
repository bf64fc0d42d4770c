import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.units import (
    counted,
    format_bytes,
    format_duration,
    format_mib,
    format_ratio,
    parse_bytes,
    parse_duration_s,
)


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("90s", 90), ("8m", 480), ("1.5h", 5400), (" 2 s ", 2)]
)
def test_a_duration_is_read_in_its_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "8", "m", "-1s", "0s", "1d", "1h30m", "nan s", f"{9**400}h", "9999999h"]
)
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="such as 90s or 8m"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4s"), (59, "59s"), (185, "3m05s"), (7630, "2h07m")]
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_bytes_are_binary() -> None:
    assert format_mib(3 * 2**20) == "3.00"
    assert format_mib(1536 * 2**20) == "1,536"
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(3 * 2**29) == "1.5 GiB"
    assert format_bytes(144 * 2**40) == "144.0 TiB"
    assert format_bytes(3 * 2**71) == "6,144.0 EiB"


@pytest.mark.parametrize("text", ["0.5B", "4096PiB", f"{9**400}GiB", "99999999999GiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="such as 24GiB"):
        parse_bytes(text)


def test_a_ratio_near_zero_is_not_zero() -> None:
    assert [format_ratio(ratio) for ratio in (1.104, 0.1, 0.0042)] == ["1.10", "0.10", "0.0042"]


def test_one_is_not_many() -> None:
    assert [counted(n, "cell") for n in (0, 1, 2, 1000)] == [
        "0 cells",
        "1 cell",
        "2 cells",
        "1,000 cells",
    ]
