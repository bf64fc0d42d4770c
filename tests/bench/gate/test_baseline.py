"""`baseline`: pins are saved on purpose only, with a reason, and never what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pinned import finding, part_of

from resblock_bench.bench.gate import baseline as baseline_pins
from resblock_bench.bench.gate import check

FOUND = {"a": {"x": {"bytes": 1000, "error": 1e-3}}, "b": {"y": {"bytes": 2}}}
MORE = {"a": {"x": {"bytes": 2000, "error": 1e-3}}, "b": {"y": {"bytes": 2}}}


@pytest.fixture
def with_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    def install(part: object) -> None:
        for module in (check, baseline_pins):
            monkeypatch.setattr(module, "pinned_parts", lambda: {"memory": part})

    return install


@pytest.fixture
def save(run_cli: Callable, with_part: Callable, tmp_path: Path) -> Callable:
    """Save a part's figures under tmp_path/pins."""

    def run(part: object, reason: str = "as it stands") -> object:
        with_part(part)
        pins = tmp_path / "pins"
        return run_cli("baseline", "save", "--memory", "--pins", pins, "--reason", reason)

    return run


def contents(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("pins/memory/*")}


def test_saved_pins_pass_and_keep_their_history(
    save: Callable, run_cli: Callable, tmp_path: Path
) -> None:
    assert save(part_of(FOUND), "to begin with").code == 0
    assert run_cli("check", "--pins", tmp_path / "pins").code == 0
    first = contents(tmp_path)
    assert {name: pin["entries"] for name, pin in first.items()} == FOUND
    done = save(part_of(MORE), "a larger buffer")
    assert "memory: 1 files changed, 1 as they were" in done.out
    second = contents(tmp_path)
    assert second["b"] == first["b"]
    assert [one["reason"] for one in second["a"]["saves"]] == ["to begin with", "a larger buffer"]


def test_a_subject_that_is_no_more_is_removed(save: Callable, tmp_path: Path) -> None:
    save(part_of(FOUND))
    assert "removed" in save(part_of({"a": FOUND["a"]})).out
    assert list(contents(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("part", "code", "text"),
    [
        (part_of(MORE, [finding("wrong")]), 5, "wrong memory a x: said"),
        (part_of(MORE, [finding("invalid")]), 3, "invalid memory a x: said"),
        (part_of({"a": {"x": {"bytes": 5, "error": None}}}), 3, "error is not a number"),
        (part_of({}), 3, "nothing was measured"),
        (part_of(MORE, crash=RuntimeError("boom")), 3, "RuntimeError: boom"),
    ],
)
def test_what_is_wrong_or_invalid_is_not_saved(
    save: Callable, tmp_path: Path, part: object, code: int, text: str
) -> None:
    save(part_of(FOUND))
    before = contents(tmp_path)
    done = save(part)
    assert done.code == code
    assert text in done.out
    assert "memory: not saved" in done.out
    assert contents(tmp_path) == before


def test_a_pin_of_another_schema_is_replaced_and_a_damaged_one_is_not(
    save: Callable, run_cli: Callable, tmp_path: Path
) -> None:
    save(part_of(FOUND))
    path = tmp_path / "pins" / "memory" / "a.json"
    whole = path.read_text()
    path.write_text(whole.replace('version": 1', 'version": 0'))
    assert save(part_of(FOUND)).code == 0
    assert run_cli("check", "--pins", tmp_path / "pins").code == 0
    path.write_text(whole[:-20])
    done = save(part_of(FOUND, crash=AssertionError("measured")))
    assert done.code == 3
    assert "restore or remove it" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory"], "--reason is empty"),
        (["--memory", "--reason", "  "], "--reason is empty"),
        (["--reason", "why"], "nothing is named to be saved: add --memory"),
    ],
)
def test_incomplete_requests_measure_nothing(
    run_cli: Callable, with_part: Callable, arguments: list[str], message: str
) -> None:
    with_part(part_of(FOUND, crash=AssertionError("measured")))
    done = run_cli("baseline", "save", *arguments)
    assert done.code == 2
    assert message in done.err


def test_what_cannot_be_measured_or_written_here_is_2(save: Callable, tmp_path: Path) -> None:
    assert "no Triton" in save(part_of(FOUND, cannot="no Triton")).err
    (tmp_path / "pins").write_text("a file")
    done = save(part_of(FOUND, crash=AssertionError("measured")))
    assert done.code == 2
    assert "cannot be written" in done.err


def test_show(save: Callable, run_cli: Callable, tmp_path: Path) -> None:
    save(part_of(FOUND), "first [of all]")
    pins = ["--pins", tmp_path / "pins"]
    done = run_cli("baseline", "show", *pins)
    assert done.code == 0
    assert "first [of all]" in done.out
    assert run_cli("baseline", "show", "memory", *pins).out == done.out
    subject = run_cli("baseline", "show", "a", *pins).out
    assert "made with tool 1.0" in subject
    assert "bytes 1,000" in subject
    unknown = run_cli("baseline", "show", "memroy", *pins)
    assert unknown.code == 2
    assert "did you mean 'memory'" in unknown.err
    empty = run_cli("baseline", "show", "--pins", tmp_path / "absent")
    assert empty.code == 3
    assert "holds no pin" in empty.out


def test_names_that_show_takes_are_shown_whole(
    save: Callable, run_cli: Callable, tmp_path: Path
) -> None:
    long = "64x256x1024-bf16-nhwc-scale_shift-" + "dropout" * 6
    save(part_of({long: FOUND["a"]}), "a reason that needs more room than a line has " * 3)
    done = run_cli("baseline", "show", "--pins", tmp_path / "pins")
    assert long in done.out
    assert run_cli("baseline", "show", long, "--pins", tmp_path / "pins").code == 0
    assert max(map(len, done.out.splitlines())) <= 100


def test_a_reason_steers_no_terminal_and_is_kept(
    save: Callable, run_cli: Callable, tmp_path: Path
) -> None:
    save(part_of(FOUND), "why \x1b]0;x\x07[/] \u202e")
    for words in ((), ("a",)):
        out = run_cli("baseline", "show", *words, "--pins", tmp_path / "pins").out
        assert "why ]0;x[/]" in out
        assert not set(out) & set("\x1b\x07\u202e")
    assert contents(tmp_path)["a"]["saves"][0]["reason"] == "why \x1b]0;x\x07[/] \u202e"


def test_pins_are_saved_through_no_link(save: Callable, tmp_path: Path) -> None:
    theirs, pins = tmp_path / "theirs", tmp_path / "pins"
    theirs.mkdir()
    pins.mkdir()
    (pins / "memory").symlink_to(theirs)
    done = save(part_of(FOUND))
    assert done.code == 2
    assert "pins cannot be written (memory is a link)" in done.err
    assert not list(theirs.iterdir())
    (pins / "memory").unlink()
    (pins / "memory").mkdir()
    (pins / "memory" / "a.json.tmp").symlink_to(theirs / "a")
    assert save(part_of(FOUND)).code == 0
    assert not list(theirs.iterdir())


def test_where_there_is_no_pin_the_command_names_the_folder(
    run_cli: Callable, with_part: Callable, tmp_path: Path
) -> None:
    with_part(part_of(FOUND))
    out = run_cli("baseline", "show", "--pins", tmp_path / "my pins").out
    assert f"resblock-bench baseline save --memory --pins '{tmp_path / 'my pins'}' --reason" in out


def test_a_pin_that_is_a_pipe_is_named(save: Callable, run_cli: Callable, tmp_path: Path) -> None:
    save(part_of(FOUND))
    os.mkfifo(tmp_path / "pins" / "memory" / "z.json")
    done = run_cli("baseline", "show", "--pins", tmp_path / "pins")
    assert done.code == 3
    assert "z.json cannot be read (it is a pipe, not a file)" in done.err


def test_diff_shows_what_changed_and_judges_nothing(
    save: Callable, run_cli: Callable, with_part: Callable, tmp_path: Path
) -> None:
    save(part_of(FOUND))
    before = contents(tmp_path)
    with_part(part_of(MORE))
    done = run_cli("baseline", "diff", "--memory", "--pins", tmp_path / "pins")
    assert done.code == 0
    assert "bytes 1,000 → 2,000" in done.out
    assert contents(tmp_path) == before


@pytest.mark.parametrize("crash", [RuntimeError("boom"), KeyboardInterrupt()])
def test_diff_of_a_part_that_could_not_be_measured_is_3(
    save: Callable, run_cli: Callable, with_part: Callable, tmp_path: Path, crash: BaseException
) -> None:
    save(part_of(FOUND))
    with_part(part_of({}, crash=crash))
    assert run_cli("baseline", "diff", "--memory", "--pins", tmp_path / "pins").code == 3
