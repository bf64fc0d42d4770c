"""`check` on seeded changes: each has its level and its exit code, and nothing missing passes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pinned import finding, part_of

from resblock_bench.bench.gate import check
from resblock_bench.bench.gate.pins import write_pins

AS_PINNED = {"a": {"x": {"bytes": 100, "error": 1e-3, "hash": "f00"}, "y": {"bytes": 7}}}


@pytest.fixture
def checked(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple]:
    """Check a part against pins of AS_PINNED, which `spoil` may change: (code, findings, out)."""

    def run(part: object, *flags: str, spoil: Callable[[Path], object] | None = None) -> tuple:
        write_pins(tmp_path, part_of(AS_PINNED), AS_PINNED, "to begin with", None)
        if spoil is not None:
            spoil(tmp_path / "memory" / "a.json")
        monkeypatch.setattr(check, "pinned_parts", lambda: {"memory": part})
        report = tmp_path / "report.json"
        done = run_cli("check", *flags, "--pins", tmp_path, "--format", "json", "--output", report)
        document = json.loads(report.read_text())
        assert document["exit_code"] == done.code
        findings = [one for one in document["report"]["findings"] if one["part"] != "timing"]
        return done.code, findings, done.out

    return run


def changed(entry: str, **figures: object) -> dict:
    return {"a": {**AS_PINNED["a"], entry: {**AS_PINNED["a"][entry], **figures}}}


def test_no_change_passes(checked: Callable) -> None:
    code, findings, out = checked(part_of(AS_PINNED))
    assert (code, findings) == (0, [])
    assert "all as pinned" in out
    assert "│memory │        2 │         2 │     0" in out


@pytest.mark.parametrize(
    ("part", "level", "code", "text"),
    [
        (part_of(changed("x", bytes=101)), "regression", 1, "bytes 100 → 101"),
        (part_of(changed("x", bytes=99)), "better", 4, "bytes 100 → 99"),
        (part_of(changed("x", error=1.3e-3)), "regression", 1, "error 0.001 → 0.0013"),
        (part_of(changed("x", hash="ba2")), "changed", 4, "hash f00 → ba2"),
        (part_of(changed("x", error=None)), "invalid", 3, "not a number"),
        (part_of(changed("x", bytes=101, error=None)), "regression", 1, "not a number"),
        (part_of({"a": {"x": AS_PINNED["a"]["x"]}}), "invalid", 3, "pinned and was not measured"),
        (part_of({"a": {**AS_PINNED["a"], "z": {"bytes": 1}}}), "invalid", 3, "has no pin"),
        (part_of({**AS_PINNED, "b": {"x": {"bytes": 1}}}), "invalid", 3, "has no pin"),
        (part_of({}), "invalid", 3, "pinned and was not measured"),
        (part_of(AS_PINNED, version="1.1"), "invalid", 3, "pinned with tool 1.0, here is 1.1"),
        (part_of(AS_PINNED, [finding("wrong")]), "wrong", 5, "said"),
        (part_of(AS_PINNED, crash=RuntimeError("boom")), "invalid", 3, "RuntimeError: boom"),
    ],
)
def test_seeded_changes(checked: Callable, part: object, level: str, code: int, text: str) -> None:
    found, findings, out = checked(part)
    assert found == code
    assert level in {one["level"] for one in findings}
    assert any(text in one["text"] for one in findings)
    assert "all as pinned" not in out
    assert text in " ".join(out.split())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (Path.unlink, "has no pin"),
        (lambda path: path.write_text(path.read_text()[:-20]), "is damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda path: path.rename(path.with_name("b.json")), "it was renamed"),
        (
            lambda path: path.write_text(path.read_text().replace('version": 1', 'version": 0')),
            "is of schema 0",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('bytes": 100', 'bytes": "100"')),
            "bytes is pinned as '100', which is not a number: restore it from git",
        ),
        (lambda path: path.write_text(re.sub(r"\[[^]]*\]", "[]", path.read_text())), "is damaged"),
    ],
)
def test_pins_that_cannot_be_relied_on(checked: Callable, spoil: Callable, text: str) -> None:
    code, findings, out = checked(part_of(AS_PINNED), spoil=spoil)
    assert code == 3
    assert [one["level"] for one in findings] == ["invalid"]
    assert text in findings[0]["text"]
    same = int("is pinned as" in text)
    assert f"│memory │        {2 * same} │         {same} │" in out


@pytest.mark.parametrize(
    ("part", "row"),
    [
        (part_of(AS_PINNED, [finding("wrong")]), "2 1 1 0 0 0"),
        (part_of(changed("x", bytes=101), [finding("wrong")]), "2 1 1 0 0 0"),
        (part_of(changed("x", bytes=99)), "2 1 0 1 0 0"),
        (part_of(changed("x", hash="ba2")), "2 1 0 0 1 0"),
        (part_of(AS_PINNED, [finding("note")]), "2 2 0 0 0 0"),
        (part_of(AS_PINNED, version="1.1"), "0 0 0 0 0 1"),
        (part_of({**AS_PINNED, "b": {"x": {"bytes": 1}}}), "2 2 0 0 0 1"),
    ],
)
def test_the_row_of_a_part(checked: Callable, part: object, row: str) -> None:
    (line,) = (line for line in checked(part)[2].splitlines() if line.startswith("│memory"))
    assert line.replace("│", " ").split()[1:-1] == row.split()


def test_within_the_tolerance_is_the_same(checked: Callable) -> None:
    assert checked(part_of(changed("x", error=1.2e-3)))[0] == 0


def test_what_cannot_be_done_is_said_and_fails_where_it_was_asked_for(
    checked: Callable, run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = part_of(AS_PINNED, cannot="no Triton")
    code, findings, _ = checked(part, "--memory")
    assert (code, findings[0]["level"]) == (3, "invalid")
    assert "not done here: no Triton" in findings[0]["text"]
    # With nothing else to do, nothing was checked at all.
    assert checked(part)[0] == 3
    other = part_of(AS_PINNED)
    monkeypatch.setattr(check, "pinned_parts", lambda: {"accuracy": part, "memory": other})
    done = run_cli("check", "--pins", tmp_path)
    assert done.code == 0
    assert "note accuracy: not done here: no Triton" in done.out
    assert "note timing: not done here: no revision is named" in " ".join(done.out.split())
    assert run_cli("check", "--accuracy", "--pins", tmp_path).code == 3
    done = run_cli("check", "--timing", "--pins", tmp_path)
    assert done.code == 3
    assert "to compare the time with: add --base REV" in " ".join(done.out.split())


def test_the_advice_names_the_parts_and_the_pins(
    checked: Callable, run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, _, out = checked(part_of(changed("x", bytes=99)))
    save = "changed on purpose: save with resblock-bench baseline save --memory"
    assert f"{save} --pins {tmp_path} --reason '…'" in out
    # Copied into a shell, it names what was named.
    spaced = tmp_path / "my pins"
    write_pins(spaced, part_of(AS_PINNED), AS_PINNED, "to begin with", None)
    out = run_cli("check", "--pins", spaced).out
    assert f"--pins '{spaced}' --reason" in out
    # Without --pins they are those of the repository around.
    monkeypatch.chdir(tmp_path)
    write_pins(tmp_path / "results/pins", part_of(AS_PINNED), AS_PINNED, "to begin with", None)
    assert f"{save} --reason" in run_cli("check").out


def test_a_report_alone_on_the_standard_output(
    checked: Callable, run_cli: Callable, tmp_path: Path
) -> None:
    checked(part_of(AS_PINNED))
    done = run_cli("check", "--pins", tmp_path, "--format", "json")
    assert json.loads(done.out)["exit_code"] == done.code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "yaml"], "unknown format 'yaml'"),
        (["--output", "absent/report.md"], "absent/report.md cannot be written (No such file"),
        (["--output", "."], ". cannot be written (Is a directory): name another"),
        (["--memory", "--base", "HEAD"], "--base goes with --timing"),
        (["--memory", "--threads", "1"], "--threads goes with --timing"),
        (["--threads", "1"], "--threads goes with --base"),
        (["--pins", "absent"], "--pins absent is no folder"),
    ],
)
def test_bad_requests_measure_nothing(
    run_cli: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    part = part_of({}, crash=AssertionError("measured"))
    monkeypatch.setattr(check, "pinned_parts", lambda: {"memory": part})
    done = run_cli("check", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(("found", "code"), [(AS_PINNED, 3), (changed("x", bytes=101), 1)])
def test_a_report_that_cannot_be_written_hides_no_verdict(
    checked: Callable, run_cli: Callable, tmp_path: Path, found: dict, code: int
) -> None:
    checked(part_of(found))
    done = run_cli("check", "--pins", tmp_path, "--format", "md", "--output", "/dev/full")
    assert done.code == code
    assert "/dev/full cannot be written (No space left on device): name" in done.out
    assert "│memory │" in done.out


def test_an_interrupt_keeps_what_the_parts_before_it_found(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_pins(tmp_path, part_of(AS_PINNED), AS_PINNED, "to begin with", None)
    parts = {
        "memory": part_of(changed("x", bytes=101)),
        "accuracy": part_of({}, crash=KeyboardInterrupt()),
        "static": part_of({}, crash=AssertionError("begun after the interrupt")),
    }
    monkeypatch.setattr(check, "pinned_parts", lambda: parts)
    done = run_cli("check", "--pins", tmp_path, "--format", "md")
    assert done.code == 1
    assert "bytes 100 → 101" in done.out
    assert "**invalid** accuracy: interrupted" in done.out
    assert "begun after" not in done.out


def test_another_checkout_is_not_checked_by_the_code_of_this_one(
    checked: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text('name = "resblock-bench"')
    monkeypatch.chdir(tmp_path)
    code, findings, _ = checked(part_of(AS_PINNED))
    assert code == 3
    assert f"{tmp_path} is a checkout of resblock-bench" in findings[0]["text"]


def test_the_pins_are_those_of_the_repository_around(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert check.default_pins(inner) == inner / "results" / "pins"
    (tmp_path / ".git").mkdir()
    assert check.default_pins(inner) == tmp_path / "results" / "pins"
    (tmp_path / "a" / "pyproject.toml").write_text('name = "resblock-bench"')
    assert check.default_pins(inner) == tmp_path / "a" / "results" / "pins"
