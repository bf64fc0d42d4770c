"""Run folders against each other, and calibrations: made-up numbers in files."""

import contextlib
import datetime
import math
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from support.cells import TINY
from support.comparing import a_round, plan_of
from support.sweeps import spawned

from resblock_bench.bench import files
from resblock_bench.bench.compare import calibration as calibration_of
from resblock_bench.bench.compare import compare
from resblock_bench.bench.compare import stored as compare_stored
from resblock_bench.bench.compare.calibration import (
    CALIBRATION_VERSION,
    MAX_AGE_DAYS,
    Calibration,
    CellNoise,
    calibration_file,
    noise_of,
    stale,
    tolerance_of,
)
from resblock_bench.bench.compare.stored import Stored
from resblock_bench.bench.compare.verdict import Estimate, Tolerance
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.findings.findings import exit_code
from resblock_bench.bench.gate import timing
from resblock_bench.bench.lockstep.rounds import RoundRule
from resblock_bench.bench.machine.environment import gather
from resblock_bench.bench.measure.cell import row_of
from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import Ratio, cell_name
from resblock_bench.bench.runs.folder import create_run

REFERENCE = TINY
FUSED = replace(TINY, impl="fused")
NOW = "2026-01-31T12:00:00+00:00"
SAVED = datetime.datetime.fromisoformat(NOW)


@pytest.fixture
def environment(found):
    return replace(found, machine="here")


def ratio_in(medians, cell):
    """To the reference in the same mode, known to a thousandth."""
    reference = medians.get(replace(cell, impl="reference"))
    if reference is None:
        return None
    value = reference / medians[cell]
    return Ratio(value=value, low=value * 0.999, high=value * 1.001)


@pytest.fixture
def run_of(tmp_path, environment, make_task):
    """Write a run folder: the median of each cell, None where it has no row; fields of its tasks
    changed."""

    def make(name, medians, conditions=None, **changes):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        tasks = [replace(make_task(), cell=cell, environment=environment) for cell in medians]
        tasks = [replace(task, **changes) for task in tasks]
        rows = [
            row_of(
                task,
                "ok",
                median_ms=medians[task.cell],
                rounds=[5] * 20,
                ratio=ratio_in(medians, task.cell),
                conditions=conditions,
            )
            for task in tasks
            if medians[task.cell] is not None
        ]
        plan = plan_of(*map(msgspec.structs.asdict, medians))
        with create_run(folder, plan, tasks[0].environment) as run:
            for row in rows:
                run.append(row)
        return folder

    return make


@pytest.fixture
def calibration(environment):
    noise = CellNoise(cell=TINY, rounds=15, disturbed=0, drift=0.01, pair_spread=0.01, spread=0.001)
    return Calibration(
        calibration_version=CALIBRATION_VERSION,
        saved_at=SAVED,
        device="cpu",
        environment=environment,
        rule=RoundRule(),
        tolerance=Tolerance(relative=0.03, absolute_ms=1e-3),
        cells=[noise],
    )


def write(path, calibration):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(files.as_json(calibration))


@pytest.fixture
def calibrated(tmp_path, calibration):
    """A machine's calibration, stored today; the one of `environment` unless another is given."""

    def store(environment=calibration.environment):
        path = calibration_file(environment, "cpu", tmp_path)
        now = datetime.datetime.now(datetime.timezone.utc)
        write(path, replace(calibration, environment=environment, saved_at=now))

    return store


@pytest.fixture
def compared(tmp_path, environment, calibrated):
    """The words by cell and the exit code of two run folders, on a machine that is calibrated."""

    def run(base, head, **options):
        if not calibration_file(environment, "cpu", tmp_path).exists():
            calibrated()
        outcome = compare.of_stored(base, head, tmp_path, **{"relative": False, **options})
        words = [item.verdict.word for item in outcome.items]
        return words, exit_code(compare.report_of(outcome).findings), outcome

    return run


@pytest.mark.parametrize(
    ("ratio", "word", "code"),
    [(1.0, "SAME", 0), (1.1, "SLOW", 1), (0.9, "FAST", 0), (1.03, "AMBIGUOUS", 4)],
)
def test_verdicts_and_codes(run_of, compared, ratio, word, code):
    words, found, _ = compared(run_of("a", {TINY: 10.0}), run_of("b", {TINY: 10.0 * ratio}))
    assert (words, found) == ([word], code)


def test_four_times_as_fast_is_to_be_explained(run_of, compared):
    _, code, outcome = compared(run_of("a", {TINY: 10.0}), run_of("b", {TINY: 2.5}))
    assert code == 3
    assert "4.0× as fast" in compare.report_of(outcome).findings[0].text


def test_a_missing_cell_is_never_a_pass(run_of, compared):
    both, one = {TINY: 10.0, FUSED: 9.0}, {TINY: 10.0}
    for base, head in ((both, one), (one, both)):
        words, code, outcome = compared(run_of("a", base), run_of("b", head))
        assert code == 3
        assert words == ["SAME", "AMBIGUOUS"]
        assert "was not planned" in compare.report_of(outcome).findings[0].text


def test_a_cell_that_was_disturbed_has_no_verdict(run_of, compared):
    before, after = (Reading(t_s=s, throttled_us={"heat": s}) for s in (0, 5))
    hot = conditions(before, after, source="test", images=1, threads=1)
    words, code, outcome = compared(run_of("a", {TINY: 10.0}), run_of("b", {TINY: 10.0}, hot))
    assert (words, code) == (["AMBIGUOUS"], 4)
    assert "the heat held the clocks back" in compare.report_of(outcome).findings[0].text


def test_a_cell_that_was_planned_and_not_measured_is_missing(run_of, compared):
    head = run_of("b", {TINY: 10.0, FUSED: None})
    words, code, outcome = compared(run_of("a", {TINY: 10.0, FUSED: 9.0}), head)
    assert (words, code) == (["SAME", "AMBIGUOUS"], 3)
    assert "was planned and not measured" in compare.report_of(outcome).findings[0].text


def test_another_machine_is_refused_by_name_of_the_field(run_of, compared, calibrated, environment):
    there = replace(environment, cpu="Another CPU", machine="there")
    calibrated(there)
    head = run_of("b", {TINY: 10.0, FUSED: 9.0}, environment=there)
    base = run_of("a", {TINY: 20.0, FUSED: 18.0})
    with pytest.raises(InvalidError, match=r"machine was here and is there.*--relative"):
        compared(base, head)
    words, code, outcome = compared(base, head, relative=True)
    assert (words, code) == (["SAME"], 0)
    assert outcome.items[0].base == pytest.approx(0.9)


def stored(environment, **changes):
    """A run of the reference and of the fused cell, both of which took 10 ms."""
    whole = Stored(
        name="run",
        environment=environment,
        expected=[REFERENCE, FUSED],
        median_ms={REFERENCE: 10.0, FUSED: 10.0},
        ratios={FUSED: Estimate(0.0, 0.001, 19, 10.0, 10.0)},
        missing={},
        disturbed={},
        contract={},
    )
    return replace(whole, **changes)


WRONG = {"missing": {FUSED: ("wrong", "is wrong")}}
CRASHED = {"missing": {FUSED: ("crashed", "is crashed")}}
DISTURBED = {"disturbed": {FUSED: "throttled"}}


@pytest.mark.parametrize("compared", [compare_stored.plain, compare_stored.relative])
@pytest.mark.parametrize(
    ("base", "head", "code"),
    [
        (DISTURBED, WRONG, 5),
        (CRASHED, WRONG, 5),
        ({}, WRONG, 5),
        (WRONG, {}, 3),
        (WRONG, CRASHED, 3),
        (DISTURBED, CRASHED, 3),
        (CRASHED, DISTURBED, 3),
        (DISTURBED, {}, 4),
        ({}, DISTURBED, 4),
    ],
)
def test_the_heavier_of_two_problems_counts(environment, calibration, compared, base, head, code):
    lacking = {"median_ms": {REFERENCE: 10.0}}
    sides = [
        stored(environment, **(lacking | changes if changes else {})) for changes in (base, head)
    ]
    known = [calibration] * (2 if compared is compare_stored.relative else 1)
    items = compared(*sides, calibration.tolerance, *known)
    (item,) = [item for item in items if item.cell == FUSED]
    outcome = compare.ComparisonOutcome("", [item], calibration.tolerance, [], [])
    assert exit_code(compare.findings_of(outcome, "compare")) == code


def test_contracts_are_compared_field_by_field(run_of, compared, environment):
    head = run_of("b", {TINY: 10.0}, seed=3)
    with pytest.raises(InvalidError, match="seed of their timing contracts was 0 and is 3"):
        compared(run_of("a", {TINY: 10.0}), head)


def test_relative_sees_the_ratio_and_not_the_machine(run_of, compared):
    base = run_of("a", {REFERENCE: 20.0, FUSED: 18.0})
    words, code, _ = compared(base, run_of("b", {REFERENCE: 5.0, FUSED: 5.4}), relative=True)
    assert (words, code) == (["SLOW"], 1)
    words, code, _ = compared(base, run_of("b", {REFERENCE: 5.0, FUSED: 4.5}), relative=True)
    assert (words, code) == (["SAME"], 0)


def test_each_run_is_judged_by_its_own_calibration(environment, calibration):
    """One machine before and after a new driver: what was calibrated holds for one of them."""
    wide = replace(calibration, cells=[replace(calibration.cells[0], pair_spread=0.2)])
    runs = [stored(environment, median_ms={REFERENCE: 10.0, FUSED: 8.0}) for _ in range(2)]
    tolerance = calibration.tolerance
    errors = []
    for pair in ((wide, calibration), (calibration, wide), (calibration, calibration)):
        (item,) = compare_stored.relative(*runs, tolerance, *pair)
        errors.append(item.verdict.detectable)
    assert errors[0] == errors[1] > errors[2]


def test_fused_against_reference_within_one(run_of, calibrated, tmp_path):
    calibrated()
    # Several times as fast is nothing sudden, here.
    outcome = compare.of_variants(run_of("c", {REFERENCE: 20.0, FUSED: 5.0}), tmp_path)
    assert exit_code(compare.report_of(outcome).findings) == 0
    outcome = compare.of_variants(run_of("a", {REFERENCE: 20.0, FUSED: 15.0}), tmp_path)
    (item,) = outcome.items
    assert item.verdict.ratio == pytest.approx(0.75)
    assert item.verdict.word == "FAST"
    with pytest.raises(InvalidError, match="has no fused cell"):
        compare.of_variants(run_of("b", {REFERENCE: 20.0}), tmp_path)


def test_ratios_are_those_of_the_rounds_and_not_of_the_medians(environment, calibration):
    """The variants of a block went through the same; the medians of two cells did not."""
    run = stored(
        environment,
        median_ms={REFERENCE: 10.0, FUSED: 20.0},
        ratios={FUSED: Estimate(math.log(0.8), 0.001, 19, 10.0, 8.0)},
    )
    (item,) = compare_stored.within(run, calibration.tolerance, calibration)
    assert (item.verdict.word, item.verdict.ratio) == ("FAST", pytest.approx(0.8))
    (item,) = compare_stored.relative(run, run, calibration.tolerance, calibration, calibration)
    assert item.verdict.word == "SAME"
    assert item.base == item.head == pytest.approx(0.8)


@pytest.mark.parametrize("ratios", [{}, {REFERENCE: Estimate(0.0, 0.0, 19, 10.0, 10.0)}])
def test_what_took_no_turns_with_its_reference_has_no_verdict(environment, calibration, ratios):
    run = stored(environment, ratios=ratios)
    for items in (
        compare_stored.within(run, calibration.tolerance, calibration),
        compare_stored.relative(run, run, calibration.tolerance, calibration, calibration),
    ):
        assert [item.verdict.word for item in items] == ["AMBIGUOUS"]


def test_a_stored_ratio_keeps_its_interval(run_of):
    folder = run_of("a", {REFERENCE: 20.0, FUSED: 15.0})
    estimate = compare_stored.load(folder).ratios[FUSED]
    assert estimate.mean == pytest.approx(math.log(0.75))
    assert estimate.error == pytest.approx(0.001 / 1.96, rel=1e-3)
    assert (estimate.freedom, estimate.base_ms, estimate.head_ms) == (19, pytest.approx(20), 15.0)


def test_what_is_no_run_folder_is_said(run_of, compared, tmp_path):
    good = run_of("a", {TINY: 10.0})
    (tmp_path / "file.json").write_text("{}")
    for path in (tmp_path / "absent", tmp_path / "file.json"):
        with pytest.raises(UsageError, match="is not a run folder"):
            compared(good, path)


def test_a_run_folder_has_one_process_a_cell(run_cli, tmp_path, calibration):
    """No verdict without a calibration, since one process shows no spread."""
    folder = tmp_path / "run"
    axes = ["channels=32", "resolution=8", "batch=1", "mode=train,inference", "checkpoint=none"]
    axes.append("impl=undisturbed")
    arguments = [argument for axis in axes for argument in ("-a", axis)]
    options = ["--samples", 6, "--threads", 1, "--no-plots"]
    done = run_cli("run", *arguments, *options, "--output", folder)
    assert done.code == 0, done.err
    same = shutil.copytree(folder, tmp_path / "same")
    outcome = compare.of_stored(folder, same, tmp_path, relative=False)
    assert {item.verdict.word for item in outcome.items} == {"AMBIGUOUS"}
    assert any("was never calibrated" in note for note in outcome.uncalibrated)
    here = compare_stored.load(folder).environment
    path = calibration_file(here, "cpu", tmp_path)
    now = datetime.datetime.now(datetime.timezone.utc)
    write(path, replace(calibration, environment=here, saved_at=now))
    outcome = compare.of_stored(folder, same, tmp_path, relative=False)
    assert {item.verdict.word for item in outcome.items} == {"SAME"}
    assert {item.cell.mode for item in outcome.items} == {"train", "inference"}
    assert exit_code(compare.report_of(outcome).findings) == 0
    assert outcome.uncalibrated == []
    assert outcome.tolerance.relative == 0.03
    (same / "cells.jsonl").write_text((same / "cells.jsonl").read_text()[:500])
    with pytest.raises(InvalidError, match="holds no whole row: go on with"):
        compare_stored.load(same)


# Calibration


def test_drift_is_the_worst_of_any_five_rounds():
    ratios = [1.0] * 5 + [1.02] * 5 + [1.0] * 5
    noise = noise_of(TINY, [a_round(ratio) for ratio in ratios], 2)
    assert noise.drift == pytest.approx(math.log(1.02))
    assert (noise.rounds, noise.disturbed) == (15, 2)
    assert noise.spread == pytest.approx(noise.pair_spread)
    assert tolerance_of([noise]).relative == pytest.approx(1.02**1.5 - 1)


def test_a_machine_can_be_too_noisy_for_a_gate():
    noisy = noise_of(TINY, [a_round(1.04)] * 5, 0)
    with pytest.raises(InvalidError, match=r"drifts by 3.9%, which is a tolerance of 6.1%, and 5%"):
        tolerance_of([noisy])


def test_no_tolerance_is_below_the_floor():
    quiet = noise_of(TINY, [a_round(1.0001)] * 5, 0)
    assert tolerance_of([quiet]) == Tolerance(relative=0.01, absolute_ms=1e-3)


def test_a_calibration_goes_stale(calibration, environment):
    rule = RoundRule()
    assert stale(calibration, environment, rule, SAVED) is None
    later = SAVED + datetime.timedelta(days=MAX_AGE_DAYS + 1)
    assert stale(calibration, environment, rule, later) == "it is 31 days old"
    earlier = SAVED - datetime.timedelta(days=1)
    assert "yet to come" in stale(calibration, environment, rule, earlier)
    torch = replace(environment, versions={**environment.versions, "torch": "9.9"})
    assert "torch was" in stale(calibration, torch, rule, SAVED)
    assert "another way" in stale(calibration, environment, RoundRule(bursts=7), SAVED)


def test_a_stale_calibration_is_said_and_not_used(
    run_of, compared, calibration, environment, tmp_path
):
    path = calibration_file(environment, "cpu", tmp_path)
    write(path, replace(calibration, saved_at=SAVED.replace(year=2020)))
    sides = run_of("a", {TINY: 10.0}), run_of("b", {TINY: 10.25})
    words, code, outcome = compared(*sides)
    # By the calibrated 3 % it would be SAME.
    assert (words, code) == (["AMBIGUOUS"], 4)
    assert outcome.tolerance.relative == 0.02
    threads = environment.threads
    assert "is stale (it is" in outcome.uncalibrated[0]
    assert f"calibrate --device cpu --threads {threads}" in outcome.uncalibrated[0]
    good = path.read_bytes()
    for damaged, message in (
        (b"{}", "is damaged"),
        (good.replace(b'version": 1', b'version": 0'), "is of schema 0"),
        (good[:-20], "is damaged"),
        (good.replace(b"2020-01-31T", b"last year "), "is damaged"),
        (good.replace(b'"relative": 0.03', b'"relative": 0.4'), "tolerance of 40.0%, and it is 1%"),
        (good.replace(b'"absolute_ms": 0.001', b'"absolute_ms": 1000'), "tolerance of 1000 ms"),
        (good.replace(b'"device": "cpu"', b'"device": "cuda"'), "of cuda, not of cpu"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InvalidError, match=message):
            compared(*sides)


def test_a_run_is_not_compared_with_itself(run_of, compared):
    path = run_of("a", {TINY: 10.0})
    with pytest.raises(UsageError, match="are one and the same"):
        compared(path, path.parent / "." / path.name)


def test_a_reader_who_has_gone_is_no_regression(run_of):
    reader, writer = os.pipe()
    os.close(reader)
    paths = [str(run_of(name, {TINY: 10.0})) for name in ("a", "b")]
    process = spawned("compare", *paths, "--format", "json", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3
    assert "its output was closed" in err


def test_the_report_names_every_cell(run_of, compared):
    _, _, outcome = compared(
        run_of("a", {REFERENCE: 10.0, FUSED: 9.0}), run_of("b", {REFERENCE: 10.0, FUSED: 11.0})
    )
    report = compare.report_of(outcome, explain=True)
    assert [row[0] for row in report.rows] == [cell_name(REFERENCE), cell_name(FUSED)]
    assert [row[5] for row in report.rows] == ["SAME", "SLOW"]
    assert report.rows[1][1:4] == ["9 ms", "11 ms", "1.222"]
    assert any("both bounds are within the tolerance of 3.0%" in note for note in report.notes)


def test_the_command_line(run_cli, run_of, calibrated, tmp_path, monkeypatch):
    calibrated()
    monkeypatch.chdir(tmp_path)
    a, b = run_of("a", {TINY: 10.0}), run_of("b", {TINY: 11.0})
    done = run_cli("compare", a, b, "--format", "json", "--output", tmp_path / "report.json")
    assert done.code == 1
    assert "SLOW" in done.out
    document = msgspec.json.decode((tmp_path / "report.json").read_bytes())
    assert document["exit_code"] == 1
    assert document["report"]["findings"][0]["level"] == "regression"
    (cell,) = document["report"]["cells"]
    assert cell["verdict"]["word"] == "SLOW"
    assert cell["head"] == pytest.approx(11.0)
    for arguments, code, message in (
        ([], 2, "0 runs were named"),
        ([a], 3, "has no fused cell"),
        ([a, b, "--base", "main"], 2, "--base measures two revisions"),
        ([a, b, "--threads", 1], 2, "--threads goes with --base"),
        ([a, b, "--format", "html"], 2, "unknown format 'html'"),
        ([a, Path("absent")], 2, "is not a run folder"),
    ):
        done = run_cli("compare", *arguments)
        assert done.code == code, done
        assert message in done.err


def test_an_empty_selection_is_not_a_pass(run_cli):
    done = run_cli("compare", "--base", "HEAD", "-a", "mode=inference", "-a", "checkpoint=full")
    assert done.code == 3
    assert "has no cell" in done.err


@pytest.mark.parametrize("verb", ["compare", "check"])
def test_the_hint_to_calibrate_names_the_cells_that_were_asked_for(run_cli, monkeypatch, verb):
    asked = []
    monkeypatch.setattr(compare, "against_base", lambda request, console: asked.append(request))
    monkeypatch.setattr(timing, "against_base", compare.against_base)
    named = ("-a", "batch=[1:4:x2]", "--preset", "smoke")
    with contextlib.suppress(AttributeError):  # nothing was measured
        run_cli(verb, *(() if verb == "compare" else ("--timing",)), "--base", "HEAD", *named)
    (request,) = asked
    environment = gather(1)
    _, note = calibration_of.usable(
        environment, "cpu", RoundRule(), Path("/nowhere"), request.cells
    )
    assert note.endswith(
        "run: resblock-bench calibrate --device cpu --threads 1 -a 'batch=[1:4:x2]' --preset smoke"
    )
