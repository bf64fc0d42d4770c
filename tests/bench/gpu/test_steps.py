"""A slice: every step ends as a row, whatever becomes of it. Steps are scripts of a line."""

import errno
import os
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from resblock_bench.bench import files
from resblock_bench.bench.errors import InvalidError, UsageError
from resblock_bench.bench.gpu import steps
from resblock_bench.bench.gpu.outcomes import (
    OUTCOMES,
    OutcomeFile,
    StepOutcome,
    last_outcomes,
    opened,
    read_outcomes,
)
from resblock_bench.bench.gpu.parts import GpuPart, GpuStep
from resblock_bench.bench.gpu.steps import SliceRequest
from resblock_bench.kernels import tuned


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking it imports torch in a process."""
    monkeypatch.setattr(steps, "_ask_machine", lambda request, console: "abc")


def running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def script(name: str, code: str, **fields: object) -> GpuStep:
    given = {"seconds": 1.0, "limit_s": 60.0, **fields}
    return GpuStep(name, f"does {name}", ("{python}", "-c", code, "{output}"), **given)


class Slices:
    """Slices of one output folder."""

    def __init__(self, output: Path, console: Console) -> None:
        self.output, self.console = output, console

    def run(self, *found: GpuStep, again: bool = False, seconds: float = 400.0) -> int:
        part = GpuPart(1, "a part", found)
        request = SliceRequest(
            parts=[part],
            output=self.output,
            stage="cuda",
            seconds=seconds,
            again=[part] if again else [],
        )
        return steps.carry_out(request, self.console)

    @property
    def outcomes(self) -> dict[str, StepOutcome]:
        return last_outcomes(read_outcomes(self.output))

    def statuses(self) -> dict[str, str]:
        return {name: outcome.status for name, outcome in self.outcomes.items()}


@pytest.fixture
def slices(tmp_path: Path) -> Slices:
    return Slices(tmp_path / "h100", Console(width=200))


def test_a_step_that_fails_is_a_row_and_the_next_one_begins(slices: Slices) -> None:
    code = slices.run(
        script("fails", "raise RuntimeError('CUDA error: an illegal memory access')"),
        script("dies", "import os; os.abort()"),
        script("works", "print('all is well')"),
    )
    assert code == 3
    assert slices.statuses() == {"fails": "failed", "dies": "failed", "works": "ok"}
    found = slices.outcomes
    assert found["fails"].sentence == "RuntimeError: CUDA error: an illegal memory access"
    assert found["fails"].exit_code == 1
    assert found["dies"].sentence.startswith("ended by SIGABRT")
    assert found["works"].sentence == "all is well"
    assert found["works"].machine == "abc" and found["works"].command[0] == sys.executable


def test_all_fine_is_0_and_wrong_results_are_5(slices: Slices) -> None:
    assert slices.run(script("a", "pass")) == 0
    assert slices.run(script("a", "pass"), script("b", "raise SystemExit(5)")) == 5


def test_a_step_with_an_outcome_is_not_run_again_unless_it_is_asked_for(slices: Slices) -> None:
    counting = script("counts", "open(__import__('sys').argv[1] + '/n', 'a').write('x')")
    for again in (False, False, True, False):
        slices.run(counting, again=again)
    assert (slices.output / "n").read_text() == "xx"
    assert [o.status for o in read_outcomes(slices.output)] == ["ok", "again", "ok"]


def test_a_step_that_hangs_is_ended_with_all_that_it_started(slices: Slices) -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child: open(sys.argv[1] + '/pids', 'w').write(f'{os.getpid()} {child}')\n"
        "else: os.setsid()\n"
        "time.sleep(1000)\n"
    )
    steps_ = script("hangs", code, limit_s=1.0), script("next", "print('goes on')")
    assert slices.run(*steps_) == 3
    assert slices.statuses() == {"hangs": "timeout", "next": "ok"}
    for pid in map(int, (slices.output / "pids").read_text().split()):
        assert not running(pid)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_GRACE_S", 0.3)


def test_what_the_end_of_a_slice_cuts_off_goes_on_in_the_next(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_LEAST_S", 0.1)
    monkeypatch.setattr(steps, "_MARGIN_S", 0.0)
    code = (
        "import os, sys\n"
        "print(sys.argv[2:])\n"
        "done = os.path.exists(sys.argv[1] + '/half')\n"
        "open(sys.argv[1] + '/half', 'w')\n"
        "print('' if done else 'stopped, since the time budget is spent: 3 left')\n"
        "sys.exit(0 if done else 3)\n"
    )
    resuming = script("resumes", code, budget="{}s", limit_s=500.0)
    assert slices.run(resuming, seconds=30) == 3
    assert slices.statuses() == {"resumes": "cut"}
    assert "time budget is spent: 3 left" in slices.outcomes["resumes"].sentence
    assert slices.run(resuming, seconds=30) == 0
    assert "['--time-budget', '29s']" in (slices.output / "logs/resumes.txt").read_text()


def test_a_budget_of_its_own_that_is_spent_ends_a_step(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('stopped, since the time budget is spent'); raise SystemExit(3)"
    one = script("run", code, budget="{}s", limit_s=50.0)
    tune = script("tune", code, budget="{}s", limit_s=50.0, endless=True)
    assert slices.run(one, tune) == 3
    assert slices.statuses() == {"run": "timeout", "tune": "ok"}


def test_a_step_is_not_begun_where_nothing_would_come_of_it(slices: Slices) -> None:
    """A run writes rows when a block is over: what is cut off before is lost."""
    first = script("first", "")
    block = script("block", "", budget="{}s", seconds=600.0, limit_s=1000.0, first_s=150.0)
    slices.run(first, block, seconds=160)
    assert slices.statuses() == {"first": "ok"}
    slices.run(first, block, seconds=400)
    assert slices.statuses() == {"first": "ok", "block": "ok"}
    # And no block is begun that would not be over in time: 400 - 15 - 150.
    budget = slices.outcomes["block"].command[-1]
    assert budget.endswith("s") and 220 < int(budget[:-1]) <= 235


def test_the_heaviest_block_alone_is_all_of_a_step(slices: Slices) -> None:
    code = "import sys; print(sys.argv[2:], 'the time budget is spent'); sys.exit(3)"
    one = script("block", code, budget="{}s", limit_s=500.0, heaviest=True)
    wrong = script("wrong", "raise SystemExit(5)", budget="{}s", limit_s=500.0, heaviest=True)
    assert slices.run(one, wrong) == 5
    assert slices.statuses() == {"block": "ok", "wrong": "failed"}
    assert slices.outcomes["block"].command[-2:] == ["--time-budget", "1s"]


def test_a_step_that_is_done_when_its_budget_is_spent_is_not_called_again(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_LEAST_S", 0.1)
    monkeypatch.setattr(steps, "_MARGIN_S", 0.0)
    one = script("run", "import time; time.sleep(0.3)", budget="{}s", first_s=999.0)
    slices.run(one, seconds=30)
    assert slices.statuses() == {"run": "ok"}


TURNS = (
    "import os, sys\n"
    "path = sys.argv[1] + '/rows.jsonl'\n"
    "n = len(open(path).readlines()) if os.path.exists(path) else 0\n"
    "if n < 2: open(path, 'a').write('begun\\n'); os.abort()\n"
)


def test_a_step_in_turns_goes_on_after_whatever_broke_one(slices: Slices) -> None:
    one = script("turns", TURNS, budget="{}", first_s=25.0, turn_s=50.0, rows="rows.jsonl")
    assert slices.run(one) == 0
    found = read_outcomes(slices.output)
    assert [outcome.status for outcome in found] == ["cut", "cut", "ok"]
    assert found[0].sentence.startswith("goes on after this: ended by SIGABRT")
    # A row that is being measured then is still written down.
    assert found[0].command[-2:] == ["--time-budget", "25"]


def test_a_step_whose_turns_add_nothing_has_failed(slices: Slices) -> None:
    code = "raise SystemExit('no such module')"
    assert slices.run(script("turns", code, budget="{}", turn_s=50.0, rows="rows.jsonl")) == 3
    assert [outcome.status for outcome in read_outcomes(slices.output)] == ["failed"]


def test_rows_that_are_asked_for_again_are_put_away(slices: Slices) -> None:
    code = "import sys; open(sys.argv[1] + '/rows.jsonl', 'a').write('row\\n')"
    one = script("turns", code, budget="{}", turn_s=50.0, rows="rows.jsonl")
    slices.run(one)
    slices.run(one, again=True)
    assert (slices.output / "rows.jsonl").read_text() == "row\n"
    (earlier,) = (slices.output / "earlier").iterdir()
    assert earlier.read_text() == "row\n"


def test_cuts_add_up_to_the_limit_of_a_step(slices: Slices) -> None:
    one = script("run", "pass", budget="{}s", limit_s=100.0)
    cut = StepOutcome(
        part=1, step="run", status="cut", exit_code=3, seconds=70.0, sentence="", command=[],
        started_at="", machine="",
    )  # fmt: skip
    with opened(slices.output) as book:
        book.append(cut)
    assert slices.run(one) == 0
    budget = slices.outcomes["run"].command[-1]
    assert budget == "30s"


def test_a_step_that_does_not_fit_waits_and_a_shorter_one_goes_before(slices: Slices) -> None:
    first, long, short = script("first", ""), script("long", "", seconds=300.0), script("short", "")
    assert slices.run(first, long, short, seconds=100) == 3
    assert list(slices.statuses()) == ["first", "short"]
    assert slices.run(first, long, short, seconds=400) == 0


def test_a_step_that_no_slice_is_long_enough_for_does_not_hold_up_the_others(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_MARGIN_S", 0.0)
    monkeypatch.setattr(steps, "_LEAST_S", 0.1)
    long = script("long", "import time; time.sleep(1000)", seconds=300.0, limit_s=900.0)
    assert slices.run(long, seconds=1.0) == 3
    assert slices.statuses() == {"long": "cut"}
    assert slices.run(long, seconds=1.0) == 3
    assert slices.statuses() == {"long": "timeout"}


def test_a_step_waits_for_the_one_that_it_needs(slices: Slices) -> None:
    needing, needed = script("b", "", after="a"), script("a", "")
    assert slices.run(needing, needed) == 3
    assert slices.statuses() == {"a": "ok"}
    assert slices.run(needing, needed) == 0


def test_a_missing_program_is_skipped_and_one_that_cannot_start_has_failed(slices: Slices) -> None:
    skipped = script("memcheck", "", tool="no-such-sanitizer")
    broken = GpuStep("broken", "cannot start", ("/no/such/program",), 1.0, 60.0)
    assert slices.run(skipped, broken) == 3
    assert slices.statuses() == {"memcheck": "skipped", "broken": "failed"}
    assert slices.outcomes["memcheck"].sentence.startswith("no-such-sanitizer is not installed")
    assert "cannot be started (No such file" in slices.outcomes["broken"].sentence


def test_a_full_disk_ends_the_slice_and_loses_nothing(
    slices: Slices, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slices.run(script("a", "print('measured')"))
    before = (slices.output / OUTCOMES).read_bytes()

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(steps.os, "write", full)
        assert slices.run(script("a", ""), script("b", "print('too much')")) == 3
    assert "make room" in capsys.readouterr().out.replace("\n", " ")
    assert (slices.output / OUTCOMES).read_bytes() == before
    assert slices.run(script("a", ""), script("b", "print('too much')")) == 0
    assert list(slices.statuses()) == ["a", "b"]


def test_what_fails_on_a_full_disk_is_no_outcome(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is not to blame: it is run again once there is room."""
    calls: list[int] = []

    def check(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # after the step
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "check_writable", check)
    assert slices.run(script("a", "raise SystemExit(3)")) == 3
    assert slices.statuses() == {}


def test_half_a_line_is_removed_and_damage_is_an_error(slices: Slices) -> None:
    slices.run(script("a", ""))
    path = slices.output / OUTCOMES
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"part": 1, "st')
    assert slices.run(script("a", ""), script("b", "")) == 0
    assert list(slices.statuses()) == ["a", "b"]
    path.write_bytes(b'{"part": "one"}\n' + whole)
    with pytest.raises(InvalidError, match=r"line 1 is damaged"):
        slices.run(script("a", ""))


def test_one_slice_at_a_time(slices: Slices) -> None:
    with opened(slices.output), pytest.raises(UsageError, match="another gpu-results"):
        slices.run(script("a", ""))


def test_an_interrupt_ends_the_step_and_keeps_what_is_over(
    slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = OutcomeFile.append

    def interrupted(book: OutcomeFile, outcome: StepOutcome) -> None:
        append(book, outcome)
        raise KeyboardInterrupt

    monkeypatch.setattr(OutcomeFile, "append", interrupted)
    assert slices.run(script("a", ""), script("b", "")) == 3
    assert slices.statuses() == {"a": "ok"}


def test_a_run_that_has_begun_is_resumed_and_what_failed_there_is_tried_again_if_asked_for(
    slices: Slices,
) -> None:
    one = script("r", "import sys; print(sys.argv[2:])", run="runs/r")
    slices.run(one)
    (slices.output / "runs/r").mkdir(parents=True)
    (slices.output / "runs/r/plan.json").write_text("{}")
    slices.run(one, again=True)
    found = [outcome.command for outcome in read_outcomes(slices.output) if outcome.status == "ok"]
    assert "--resume" not in found[0]
    assert found[1][-2:] == ["--resume", "--retry-failed"]


def test_steps_are_of_the_machine_that_the_output_is_named_after(slices: Slices) -> None:
    code = "import os; print(os.environ['RESBLOCK_BENCH_MACHINE'], os.environ['TRITON_INTERPRET'])"
    slices.run(script("a", code))
    assert slices.outcomes["a"].sentence == "h100 0"


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("a\n\x1b[31m=== 2 failed in 12.30s ===\x1b[0m\n", "2 failed in 12.30s"),
        ("2 failed, 3 passed in 12.30s\nw\n", "2 failed, 3 passed in 12.30s"),
        ("x\nresblock-bench: name one\n\n", "name one"),
        ("RuntimeError: CUDA: x\nCompile with `TORCH_USE_CUDA_DSA`\n", "RuntimeError: CUDA: x"),
        ("========= ERROR SUMMARY: 3 errors\n========= \n", "ERROR SUMMARY: 3 errors"),
        ("9 of 9 cells: 6 ok.\nits page is written by: z\n", "9 of 9 cells: 6 ok."),
        ("said\n└───┘\n", "said"),
        ("", ""),
    ],
    ids=["pytest", "quiet pytest", "sentence", "error", "sanitizer", "run", "ornaments", "nothing"],
)  # fmt: skip
def test_the_line_that_says_what_became_of_a_command(printed: str, said: str) -> None:
    assert steps.last_line(printed) == said


def test_what_was_printed_by_an_earlier_try_does_not_count(slices: Slices) -> None:
    one = script("a", "print('first')")
    slices.run(one)
    slices.run(script("a", "pass"), again=True)
    assert slices.outcomes["a"].sentence == "it printed nothing"


def test_outcomes_are_written_as_they_are_read(slices: Slices) -> None:
    slices.run(script("a", "print('x')"))
    line = (slices.output / OUTCOMES).read_bytes()
    found = msgspec.json.decode(line, type=StepOutcome)
    assert found == slices.outcomes["a"]


@pytest.mark.slow
def test_a_tuned_step_has_kernels_that_read_the_table_and_leaves_the_others_alone(
    slices: Slices,
) -> None:
    code = (
        "from resblock_bench.kernels import tuned; from resblock_bench.bench import units; "
        "print(tuned.path_of('sm_77').exists(), units.MIB)"
    )
    one = script("tuned", code, tuned=True)
    slices.run(one)
    assert slices.statuses() == {"tuned": "skipped"}
    assert "there is no table of launches to read" in slices.outcomes["tuned"].sentence
    table = tuned.Table(arch="sm_77", machine={}, commit="", measured_at="", entries=[])
    (slices.output / "tables/tuned.json").write_bytes(msgspec.json.encode(table))
    assert slices.run(one, again=True) == 0
    assert slices.outcomes["tuned"].sentence == "True 1048576"
    assert not tuned.path_of("sm_77").exists()


def test_a_file_that_is_kept_is_copied_from_the_checkout(
    slices: Slices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    another = tmp_path / "results/another/c-2.json"  # machine's
    another.parent.mkdir(parents=True)
    another.write_text("{}")
    os.utime(another, (1e9, 1e9))
    code = "import os; os.makedirs('results/m'); open('results/m/c-1.json', 'w').write('{}')"
    assert slices.run(script("calibrate", code, keep="results/*/c-*.json")) == 0
    kept = {path.name for path in (slices.output / "calibration").iterdir()}
    assert kept == {"c-1.json"}
