"""The tables of measured launches: what is read, what is refused, and what a call then takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import check, problem
from support.running import run_operator

from resblock_bench.kernels import dispatch, tuned
from resblock_bench.kernels.tiers import Choice, Machine, Problem, plan_launch, shape

MACHINE = Machine(sms=4, l2_bytes=2**20)
CALL = Problem(N=2, C=8, HW=256, G=4, channels_last=False, element_size=4)
ENTRY = {
    "bucket": ["forward", "nchw", 4, 2, 256, 8],
    "tier": "D",
    "tile": 64,
    "warps": 1,
    "waves": 1,
    "tiles": 2,
    "time_us": 4.0,
    "rules_us": 5.0,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a table of one entry with some of its fields changed, or some text, for sm_00."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)

    def write(text: str | bytes | None = None, **changes: Any) -> Path:
        path = tmp_path / "sm_00.json"
        if text is None:
            table = {
                "arch": "sm_00",
                "machine": {"gpu": "none"},
                "commit": "0",
                "measured_at": "2025-01-01T00:00:00+00:00",
                "entries": [ENTRY | changes],
            }
            text = json.dumps(table)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        tuned.forget()
        return path

    tuned.forget()
    yield write
    tuned.forget()


def test_a_measured_bucket_takes_its_choice(write: Write) -> None:
    write()
    launch = tuned.launch_for("forward", CALL, MACHINE, "sm_00")
    wanted = shape("forward", CALL, MACHINE, Choice("D", 64, 1, 1, 2))
    assert launch is not None and launch.tier == "D" and launch.splits == 2
    assert launch == wanted._replace(reason=f"measured on sm_00: {wanted.reason}")


@pytest.mark.parametrize(
    "other",
    [
        {"HW": 255},
        {"C": 16},
        {"N": 1},
        {"N": 3},
        {"channels_last": True},
        {"element_size": 2},
    ],
    ids=str,
)
def test_other_buckets_take_the_rules(write: Write, other: dict[str, Any]) -> None:
    write()
    assert tuned.launch_for("forward", CALL._replace(**other), MACHINE, "sm_00") is None
    assert tuned.launch_for("backward", CALL, MACHINE, "sm_00") is None


def test_a_bucket_has_all_calls_of_up_to_so_many_groups(write: Write) -> None:
    write(bucket=["forward", "nchw", 4, 2, 256, 16])
    taken = [
        tuned.launch_for("forward", CALL._replace(N=N), MACHINE, "sm_00") is not None
        for N in range(1, 6)
    ]
    assert taken == [False, False, True, True, False]


def test_an_architecture_without_a_table_takes_the_rules(write: Write) -> None:
    write()
    assert tuned.launch_for("forward", CALL, MACHINE, "sm_01") is None
    assert tuned.launch_for("forward", CALL, MACHINE, None) is None


def test_a_choice_that_does_not_hold_a_call_gives_way_to_the_rules(write: Write) -> None:
    """A bucket's largest call may exceed what the measured one did not."""
    write(tier="C")
    assert tuned.launch_for("forward", CALL, MACHINE, "sm_00") is not None
    small_cache = Machine(sms=4, l2_bytes=1024)
    assert tuned.launch_for("forward", CALL, small_cache, "sm_00") is None


def test_a_table_is_read_once_until_it_is_forgotten(write: Write) -> None:
    path = write()
    before = tuned.launch_for("forward", CALL, MACHINE, "sm_00")
    path.unlink()
    assert tuned.launch_for("forward", CALL, MACHINE, "sm_00") is before
    tuned.forget()
    assert tuned.launch_for("forward", CALL, MACHINE, "sm_00") is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tile": 96}, "powers of two"),
        ({"warps": 3}, "powers of two"),
        ({"tile": 2}, "`int` >= 4"),  # dropout draws four positions at once
        ({"tile": 2**18}, "`int` <= 131072"),
        ({"warps": 64}, "`int` <= 32"),
        ({"waves": 0}, "`int` >= 1"),
        ({"tier": "E"}, "Invalid enum value 'E'"),
        ({"tiles": 0}, "`int` >= 1"),
        ({"cooperative": True}, "unknown field `cooperative`"),
        ({"note": "fast"}, "unknown field `note`"),
        ({"bucket": ["forward", "nchw", 4, 2, 256]}, "length 6"),
        ({"time_us": None}, "Expected `float`"),
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_meant_is_refused(
    write: Write, changes: dict[str, Any], problem: str
) -> None:
    path = write(**changes)
    with pytest.raises(ValueError, match="is not a table of launches") as error:
        tuned.launch_for("forward", CALL, MACHINE, "sm_00")
    assert problem in str(error.value)
    assert str(path) in str(error.value) and "remove it" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"arch": "sm_00"}', b'{"arch": "\xff"}'], ids=str)
def test_a_damaged_file_is_an_error_that_names_it(write: Write, text: str | bytes) -> None:
    path = write(text)
    with pytest.raises(ValueError, match="remove it: the rules then hold until") as error:
        tuned.read(path)
    assert str(path) in str(error.value)


def test_a_call_takes_the_table_of_its_gpu(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_machine", lambda device: (MACHINE, "sm_00"))
    write()
    x = torch.randn(2, 8, 16, 16)
    assert plan_launch("forward", CALL, MACHINE).tier == "A"
    assert dispatch.launch_for("forward", x, 4).reason.startswith("measured on sm_00")
    assert dispatch.launch_for("backward", x, 4).tier == "A"
    with dispatch.prefer("triton", "B"):
        assert dispatch.launch_for("forward", x, 4).tier == "B"
    with dispatch.prefer("triton"):
        check(run_operator, problem(2, 8, 16, 16, groups=4))


def test_the_tables_of_this_package_are_whole() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        table = tuned.read(path)
        assert table.arch == path.stem
        buckets = [entry.bucket for entry in table.entries]
        assert len(set(buckets)) == len(buckets) > 0
