"""The page as a browser reads it: its parts, what it says, and what it never does."""

import base64
import dataclasses
import hashlib
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.made_rows import HOT, NOTHING
from support.orders import Given
from support.pages import Tag, parsed

from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.profile.profiles import PROFILE, PROFILES, Profile
from resblock_bench.bench.records import OOM_EXPECTED, Row, config_name
from resblock_bench.bench.report import content, derived
from resblock_bench.bench.report.page import rendered, write_page
from resblock_bench.bench.report.predicted import predicted
from resblock_bench.bench.report.profiled import MOST_PROFILES
from resblock_bench.bench.runs.folder import Run

ROOT = Path(__file__).parents[3]
HOSTILE = "\x1b[31m</script></style><script>alert('1')</script>\" onload='x' \u202e&amp; <b>"
PLAIN = "[31m</script></style><script>alert('1')</script>\" onload='x' &amp; <b>"
"""What is seen of it."""


def with_rows(run: Run, *rows: Row) -> Run:
    return dataclasses.replace(run, attempts=list(rows))


def changed(run: Run, place: int, **changes: object) -> Run:
    """The run with one row changed."""
    rows = list(run.attempts)
    rows[place] = msgspec.structs.replace(rows[place], **changes)
    return with_rows(run, *rows)


def page_of(*runs: Run, predict: bool = False) -> Tag:
    return parsed(rendered(runs, "resblock-bench report", predict=predict))


def part(page: Tag, heading: str) -> str:
    """The text from a heading of the third level to the next."""
    text = page.all("main")[0].text()
    names = [tag.text() for tag in page.all("h2", "h3")]
    begin = text.index(heading, text.index("Validity") if heading != "Validity" else 0)
    later = names[names.index(heading) + 1 :]
    return text[begin : text.index(later[0], begin + 1) if later else None]


def table(page: Tag, id: str) -> list[list[str]]:
    """The texts of a table's body."""
    (found,) = (tag for tag in page.all("table") if tag.get("id") == id)
    rows = found.all("tbody")[0].all("tr")
    return [[cell.text() for cell in row.all("th", "td")] for row in rows]


@pytest.fixture(autouse=True)
def _figures_where_they_are_looked_at(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes a second, and most tests are about what else is on a page."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(content, "all_figures", lambda run: ())


@pytest.fixture
def drawn() -> None:
    """Asked for by tests that look at figures."""


@pytest.fixture(scope="module")
def known() -> dict[str, Tag]:
    return {}


@pytest.fixture
def page(run: Run, known: dict[str, Tag], drawn: None) -> Tag:
    """That of the run, made once for all who only read it."""
    if not known:
        known["page"] = page_of(run)
    return known["page"]


def test_validity_stands_above_the_numbers(page: Tag) -> None:
    names = [tag.text() for tag in page.all("h3")]
    assert names == [
        "Validity", "Headline", "Speed against memory", "Throughput and peak over the grid",
        "All cells", "Environment",
    ]  # fmt: skip
    assert "12 cells planned, 12 with a row: 12 ok." in part(page, "Validity")
    assert "did nothing else while the cells were timed" in part(page, "Validity")


def test_no_level_of_heading_is_skipped(page: Tag) -> None:
    levels = [int(tag.name[1]) for tag in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_every_table_tells_a_screen_reader_what_it_is(page: Tag) -> None:
    tables = page.all("table")
    assert len(tables) == 5
    for found in tables:
        assert len(found.all("caption")) == 1
        head, body = found.all("thead")[0], found.all("tbody")[0]
        assert all(cell.get("scope") == "col" for cell in head.all("th"))
        for row in body.all("tr"):
            assert [cell.get("scope") for cell in row.all("th")] == ["row"]
            assert len(row.all("th", "td")) == len(head.all("th"))


def test_whatever_scrolls_can_be_reached_and_is_named(page: Tag) -> None:
    wide = [tag for tag in page.all("div") if tag.get("class") == "wide"]
    assert wide
    for tag in wide:
        assert (tag.get("tabindex"), tag.get("role")) == ("0", "region")
        assert tag.get("aria-label")


def test_every_picture_has_words_and_the_command_that_draws_it_again(page: Tag) -> None:
    pictures = page.all("svg")
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.get("role") == "img"
        assert "The numbers are in the table" in picture.get("aria-label")
        assert len(picture.all("path")) > 10
    for figure in page.all("figure"):
        assert "resblock-bench plot" in figure.all("figcaption")[0].text()
        assert "a-run" in figure.all("figcaption")[0].text()


def test_ids_are_unique_and_whatever_refers_to_one_finds_it(run: Run, drawn: None) -> None:
    page = page_of(run, run)
    tags = page.all()
    ids = [tag.get("id") for tag in tags if tag.get("id")]
    assert len(ids) == len(set(ids))
    wanted = set()
    for tag in tags:
        for name, value in tag.attributes.items():
            wanted |= set(re.findall(r"url\(#([^)]+)\)", value))
            if name in ("href", "xlink:href") and value.startswith("#"):
                wanted.add(value[1:])
            if name in ("for", "data-table", "aria-labelledby"):
                wanted.add(value)
    assert wanted
    assert wanted <= set(ids)


def test_a_page_loads_nothing_and_runs_one_script(run: Run, drawn: None) -> None:
    html = rendered([run], "", predict=False)
    page = parsed(html)
    for tag in page.all():
        assert not {"src", "srcset", "action", "data", "style"} & tag.attributes.keys()
        assert not [name for name in tag.attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert tag.get(name).startswith("#") or not tag.get(name)
    (script,), (style,) = page.all("script"), page.all("style")
    assert "url(" not in "".join(map(str, style.parts))
    assert "@import" not in "".join(map(str, style.parts))
    (policy,) = (tag.get("content") for tag in page.all("meta") if tag.get("http-equiv"))
    assert "default-src 'none'" in policy
    for tag in (script, style):
        text = "".join(map(str, tag.parts))
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag.name}-src 'sha256-{digest}'" in policy
    assert "\r" not in html


def test_one_script_whatever_the_rows_say(run: Run) -> None:
    (mine,) = page_of(run).all("script")
    (other,) = page_of(changed(run, 0, status="failed", reason=HOSTILE, **NOTHING)).all("script")
    assert mine == other


def test_names_and_messages_are_text(run: Run, tmp_path: Path, drawn: None) -> None:
    axes = msgspec.structs.replace(run.rows[1].axes, impl=HOSTILE, model=HOSTILE)
    hostile = changed(run, 1, axes=axes, device_name=HOSTILE, host=HOSTILE, commit=HOSTILE)
    failed = {"status": "failed", "reason": HOSTILE, "output": HOSTILE, **NOTHING}
    hostile = changed(hostile, 3, **failed)
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    environment = msgspec.structs.replace(run.environment, cpu=HOSTILE, versions={HOSTILE: HOSTILE})
    hostile = dataclasses.replace(hostile, folder=folder, environment=environment, notes=(HOSTILE,))
    html = rendered([hostile], HOSTILE, predict=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    page = parsed(html)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("b", "img")
    text = page.text()
    assert text.count(" ".join(PLAIN.split())) >= 8
    (row,) = table(page, "r1-missing-table")
    assert row[2].startswith(" ".join(PLAIN.split()))


def test_ten_megabytes_of_output_leave_a_page_that_opens(run: Run, drawn: None) -> None:
    huge = "x <&> " * 1_700_000
    rows = [
        msgspec.structs.replace(
            row, status="crashed", reason=huge, output=huge + "the end", **NOTHING
        )
        for row in run.rows[1:]
    ]
    axes = msgspec.structs.replace(run.rows[0].axes, impl=huge)
    rows.append(msgspec.structs.replace(run.rows[0], axes=axes, device_name=huge))
    html = rendered([with_rows(run, run.rows[0], *rows)], "", predict=False)
    assert len(html) < 400_000
    assert "the end" in html


def test_no_number_is_written_that_is_none(run: Run) -> None:
    correctness = run.rows[1].correctness
    assert correctness is not None
    errors = dict.fromkeys(correctness.errors)
    wrong = msgspec.structs.replace(correctness, errors=errors)
    fields = {**NOTHING, "correctness": wrong}
    html = rendered([changed(run, 1, status="wrong", reason="r", **fields)], "", predict=False)
    assert not re.search(r"\b(NaN|nan|Infinity|inf)\b", html)
    assert "not finite" in html
    for tag in parsed(html).all("td"):
        assert not tag.get("data-v") or float(tag.get("data-v")) >= 0


def test_a_run_without_a_measurement_says_so(run: Run, drawn: None) -> None:
    rows = [
        msgspec.structs.replace(row, status="oom", reason="no room", **NOTHING) for row in run.rows
    ]
    page = page_of(with_rows(run, *rows))
    assert "No cell has a measurement" in part(page, "Validity")
    assert not page.all("svg")
    assert len(table(page, "r1-missing-table")) == 12
    empty = page_of(with_rows(run))
    assert "12 planned cells not measured yet" in part(empty, "Validity")
    assert "12 cells planned, 0 with a row: none." in part(empty, "Validity")


def test_validity_counts_what_is_left_out(run: Run) -> None:
    run = changed(run, 1, conditions=HOT)
    run = changed(run, 3, status="wrong", reason="grad x is off", **NOTHING)
    run = changed(run, 5, status="failed", reason="no such operator", dirty=True, **NOTHING)
    run = changed(run, 7, code="another", dirty=True, attempt=2, stop_rule="time")
    text = part(
        page_of(dataclasses.replace(run, notes=("the last line is half-written",))), "Validity"
    )
    for sentence in (
        "12 cells planned, 12 with a row: 10 ok, 1 wrong, 1 failed.",
        "the last line is half-written",
        "1 cell wrong: the results differ from float64",
        "1 cell failed, crashed",
        "! 1 of 10 cells were disturbed",
        "left out of every mean",
        "9 of 10 reached the precision",
        "1 cell measured more than once",
        "The rows are of 2 versions of one implementation's code: not all compare.",
        "1 cell measured with changes not committed",
    ):
        assert sentence in text
    assert "did nothing else" not in text


def test_every_cell_stands_in_the_table_with_what_it_is_sorted_by(run: Run) -> None:
    run = changed(run, 1, conditions=HOT)
    run = changed(run, 3, status="failed", reason="why", **NOTHING)
    page = page_of(run)
    lines = table(page, "r1-table")
    assert len(lines) == 12
    assert lines[1][:5] == ["32 8² b2", "fp32 nchw train", "fused/none", "ok, disturbed", "181.8"]
    assert lines[1][6] == "0.91 (0.82–1.00)"
    assert lines[3][3:10] == ["failed", *["–"] * 6]
    (found,) = (tag for tag in page.all("table") if tag.get("id") == "r1-table")
    rates = [row.all("td")[3] for row in found.all("tbody")[0].all("tr")]
    for cell in rates:
        if cell.text() != "–":
            assert float(cell.get("data-v")) == pytest.approx(float(cell.text()), abs=0.06)
        else:
            assert "data-v" not in cell.attributes


def test_of_a_whole_model_the_page_says_which_part_its_blocks_are(run: Run) -> None:
    first = run.rows[0]

    def row(workload: str, median_ms: float) -> Row:
        cell = msgspec.structs.replace(first.axes, model="iddpm-cifar10-uncond", workload=workload)
        return msgspec.structs.replace(first, axes=cell, median_ms=median_ms)

    rows = row("model", 10.0), row("blocks", 7.0)
    assert "reference/none, 70% of step" in page_of(with_rows(run, *rows)).text()


def test_a_cell_without_a_measurement_has_its_reason_and_the_command_that_tries_it_again(
    run: Run,
) -> None:
    page = page_of(
        changed(run, 3, status="failed", reason="no such op", output="Traceback", **NOTHING)
    )
    ((name, status, reason, again),) = table(page, "r1-missing-table")
    assert name.endswith("fused/selective")
    assert status == "failed"
    assert reason == "no such op what it printed Traceback" or "Traceback" in reason
    assert "-a checkpoint=selective" in again


def test_the_wall_is_told_with_its_limit(run: Run) -> None:
    limit = {"memory_limit_bytes": 2**30}
    run = changed(run, 6, status="oom", reason="out of memory", **NOTHING, **limit)
    run = changed(run, 8, status="skipped", reason=f"{OOM_EXPECTED}: …", **NOTHING, **limit)
    text = part(page_of(run), "The wall")
    assert "1 cell ran out of memory, with a limit of 1.0 GiB; 1 larger cell" in text


def test_predicted_memory_stands_beside_what_was_measured(run: Run, some_row: Callable) -> None:
    """On a CPU both count the same tensors."""
    true = some_row("train")
    page = page_of(with_rows(run, true), predict=True)
    (line,) = table(page, "r1-table")
    assert line[9] == line[10] != "–"
    assert "to the byte, in 1 of 1 cells" in part(page, "All cells")
    off = page_of(with_rows(run, run.rows[0]), predict=True)
    assert "in 0 of 1 cells; it is off by at most" in part(off, "All cells")


def test_a_run_of_very_many_figures_shows_some(
    run: Run, monkeypatch: pytest.MonkeyPatch, drawn: None
) -> None:
    """Every dropout that a file names has figures of its own."""
    assert "figures are shown here" not in page_of(run).text()
    monkeypatch.setattr(content, "MOST_FIGURES", 2)
    page = page_of(run)
    assert len(page.all("svg")) == 2
    assert "No more than 2 figures are shown here" in page.text()


def test_a_step_of_more_images_than_any_is_not_predicted(run: Run) -> None:
    """Somebody else's file may name a batch for which a prediction would not end."""
    cell = msgspec.structs.replace(run.rows[0].axes, batch=4097)
    assert predicted([msgspec.structs.replace(run.rows[0], axes=cell)]) == {}
    assert predicted(run.rows[:1]).keys() == {run.rows[0].axes}


def test_several_runs_stand_below_each_other(run: Run, tmp_path: Path, drawn: None) -> None:
    other = dataclasses.replace(run, folder=tmp_path / "b-run")
    page = page_of(run, other)
    names = [tag.text() for tag in page.all("h2")]
    assert [name.rpartition(", ")[2] for name in names] == ["a-run", "b-run", "Method"]
    assert len(page.all("svg")) == 6
    with pytest.raises(UsageError, match="2 runs were named"):
        write_page([run, other], None)


def test_controls_wait_for_the_script(page: Tag) -> None:
    """Without it there is nothing to press that does nothing."""
    assert not page.all("button")
    for controls in (tag for tag in page.all("div") if tag.get("class") == "filter"):
        assert "hidden" in controls.attributes
        assert controls.all("label")[0].get("for") == controls.all("input")[0].get("id")


def test_report_writes_the_page_into_the_folder(run_cli: Callable, stored: Callable) -> None:
    folder = stored()
    done = run_cli("report", folder)
    assert (done.code, done.out) == (0, f"{folder / 'report.html'}\n")
    assert f"resblock-bench report {folder}" in (folder / "report.html").read_text()


def test_report_takes_the_place_of_a_link_and_follows_one_that_was_named(
    run_cli: Callable, stored: Callable, tmp_path: Path
) -> None:
    folder, theirs, mine = stored(), tmp_path / "theirs", tmp_path / "mine.html"
    theirs.write_text("theirs")
    (folder / "report.html").symlink_to(theirs)
    assert run_cli("report", folder).code == 0
    assert theirs.read_text() == "theirs"
    mine.symlink_to(theirs)
    assert run_cli("report", folder, "--output", mine).code == 0
    assert "<!DOCTYPE html>" in theirs.read_text()


def test_a_page_on_the_standard_output_has_nothing_behind_it(
    run_cli: Callable, stored: Callable, tmp_path: Path
) -> None:
    done = run_cli("report", stored(), "--output", tmp_path / "page.html")
    assert done.out == ""
    assert done.err == f"{tmp_path / 'page.html'}\n"


def test_the_commands_of_the_documentation_make_pages(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(.*?)```", text, re.S)
    assert block is not None
    one, several = map(shlex.split, block[1].splitlines())
    for folder in (one[2], several[2], several[3]):
        shutil.copytree(ROOT / one[2], tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(content, "predicted", lambda rows: {})
    assert run_cli(*one[1:]).out == f"{one[2]}/report.html\n"
    assert run_cli(*several[1:]).code == 0
    names = [tag.text() for tag in parsed((tmp_path / "both.html").read_text()).all("h2")]
    assert [name.rpartition(", ")[2] for name in names] == ["RUN", "OTHER-RUN", "Method"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["absent"], 2, "absent is not a run folder"),
        (["a-run", "--output", "a-run"], 2, "a-run cannot be written (Is a directory)"),
        (["a-run", "--output", "no/page.html"], 2, "no/page.html cannot be written (No such file"),
        (["a-run", "--output", "/dev/full"], 2, "/dev/full cannot be written (No space left"),
        (["a-run", "--output", ""], 2, "an empty path"),
        (["a-run", "a-run"], 2, "2 runs were named, and their page lies in no one's folder"),
        ([], 2, "RUN"),
        (["bad"], 3, "line 1 is damaged"),
    ],
    ids=lambda value: " ".join(value).replace("/", "_") if isinstance(value, list) else "",
)
def test_a_page_that_cannot_be_made_is_one_sentence(
    run_cli: Callable, stored: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    run: Run, words: list[str], code: int, message: str,
) -> None:  # fmt: skip
    """Before anything is drawn, but where a disk is full."""
    monkeypatch.chdir(tmp_path)
    stored(with_rows(run))
    stored(dataclasses.replace(with_rows(run), folder=tmp_path / "bad"))
    (tmp_path / "bad" / "cells.jsonl").write_text("garbage\n")
    done = run_cli("report", *words)
    assert done.code == code
    assert message in " ".join(done.err.split())
    assert not list(tmp_path.glob("*/report.html"))


def test_a_half_written_row_is_told(run_cli: Callable, stored: Callable) -> None:
    folder = stored()
    content = (folder / "cells.jsonl").read_bytes()
    (folder / "cells.jsonl").write_bytes(content[:-100])
    done = run_cli("report", folder)
    assert done.code == 0
    assert "is half-written and was left out" in done.err
    assert "is half-written and was left out" in (folder / "report.html").read_text()
    assert os.listdir(folder).count("report.html") == 1


def test_a_long_configuration_keeps_its_cell_whole(run: Run) -> None:
    config = f'{{"_class_name":"UNet2DModel","down_block_types":"{"x" * content.MOST_TEXT}"}}'
    name = config_name("UNet2DModel", config)
    axes = msgspec.structs.replace(
        run.attempts[0].axes, workload="model", model=name, config=config
    )
    page = page_of(changed(run, 0, axes=axes))
    assert f"{name} whole model" in page.text()
    assert "xxx" not in page.text()


def test_profiles_in_the_folder_are_shown_and_what_they_say_is_text(
    run: Run, profiled: Callable[..., Profile]
) -> None:
    assert not [tag for tag in page_of(run).all("h3") if tag.text() == "Profiles"]
    found = profiled()
    memory = msgspec.structs.replace(found.memory, peak_module=HOSTILE, held={HOSTILE: 1})
    parts = [*found.parts[:-1], msgspec.structs.replace(found.parts[-1], module=HOSTILE)]
    hostile = msgspec.structs.replace(found, memory=memory, parts=parts, notes=[HOSTILE])
    for number in range(MOST_PROFILES + 1):
        folder = run.folder / PROFILES / f"{number}"
        folder.mkdir(parents=True)
        (folder / PROFILE).write_bytes(msgspec.json.encode(hostile))
    page = page_of(run)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("b", "img")
    assert len(page.all("svg")) == 2 * MOST_PROFILES
    text = part(page, "Profiles")
    assert "so recording it costs" in text
    assert "1 more profile in profiles/ of the folder." in text
    assert "convolution" in {row[0] for row in table(page, "r1-profile-1-groups")}
    assert " ".join(PLAIN.split()) in text
    ids = [tag.get("id") for tag in page.all() if tag.get("id")]
    assert len(ids) == len(set(ids))


def test_a_damaged_profile_is_a_damaged_folder(run: Run) -> None:
    folder = run.folder / PROFILES / "0"
    folder.mkdir(parents=True)
    (folder / PROFILE).write_text("{}")
    with pytest.raises(InvalidError, match=r"profile\.json is damaged"):
        page_of(run)


def test_what_follows_from_a_run_with_a_damaged_profile_says_so(
    run: Run, stored: Callable[..., Path]
) -> None:
    folder = stored()
    (folder / PROFILES / "0").mkdir(parents=True)
    (folder / PROFILES / "0" / PROFILE).write_text("{}")
    wanted = msgspec.json.encode({"folder": str(folder), "formats": [], "plots": True})
    reply = msgspec.json.decode(derived._write_derived(wanted, Given()))
    assert "profile.json is damaged" in reply["problem"]
    assert [path for path in reply["paths"] if path.startswith("figure: ")]
