"""Runs the steps of the parts: each in a process of its own, whose end is a row, whatever it is.

    OUTPUT/steps.jsonl   an outcome a line, on disk before the next step begins
    OUTPUT/machines/     the machines that outcomes name

A slice ends when its time is spent. A step with an outcome is not run again, unless `again` says
so; one that was cut off by the end of a slice goes on in the next. The process that waits for them
never touches the GPU.
"""

import contextlib
import datetime
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.checkout import checkout_around, package_folder
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.machine.parent import die_with_parent, end_tree
from resblock_bench.bench.records import Environment
from resblock_bench.bench.terminal import say, visible
from resblock_bench.bench.units import counted, format_duration
from resblock_bench.kernels import tuned

from .outcomes import (
    OUTCOMES,
    OVER,
    OutcomeFile,
    StepOutcome,
    StepStatus,
    last_outcomes,
    opened,
    read_outcomes,
)
from .parts import MACHINES, TABLE_FILE, GpuPart, GpuStep, Stage

SENTENCE = 300  # characters
SPENT = "the time budget is spent"
"""What `run`, `tune` and the operators say when they stopped for it."""
_TAIL_BYTES = 1 << 16
_PROBE_S = 120.0
_GRACE_S = 8.0  # a program that is told to end keeps what it has measured
_REAP_S = 10.0  # what is held up in a driver cannot be killed
_MARGIN_S = 15.0  # of a slice, for a program to notice that its budget is spent
_LEAST_S = 45.0  # a program that can be cut off gets something done in
_PROBE = """
import sys, msgspec
from resblock_bench.bench.machine.environment import gather
from resblock_bench.bench.machine.proc import usable_cpus
sys.stdout.buffer.write(msgspec.json.encode(gather(usable_cpus())))
"""


@dataclass(frozen=True)
class SliceRequest:
    """A slice as asked for.

    parts   those to measure
    again   those whose outcomes do not count any more
    """

    parts: Sequence[GpuPart]
    output: Path
    stage: Stage
    seconds: float
    again: Sequence[GpuPart] = ()


class _NotStarted(Exception):
    """A command that the system does not start."""


def pending(
    parts: Sequence[GpuPart], outcomes: Sequence[StepOutcome]
) -> list[tuple[GpuPart, GpuStep]]:
    """The steps that are not over, in their order."""
    last = last_outcomes(outcomes)
    over = {name for name, outcome in last.items() if outcome.status in OVER}
    return [(part, step) for part in parts for step in part.steps if step.name not in over]


def default_output(start: Path) -> Path:
    """results/gpu/<machine> in the project checkout around `start`, else in `start`."""
    return checkout_around(start) / "results" / "gpu" / machine_name()


def listing(parts: Sequence[GpuPart], output: Path) -> Table:
    """The parts and their steps, with the minutes that they are expected to take on an H100, and
    what became of those that ran."""
    known = last_outcomes(read_outcomes(output)) if (output / OUTCOMES).exists() else {}
    total = sum(part.minutes for part in parts)
    table = Table(
        title=f"{total:.0f} minutes on an H100, by estimate, into {output}", title_justify="left"
    )
    for heading in ("part", "step", "what"):
        table.add_column(heading)
    table.add_column("minutes", justify="right")
    table.add_column("outcome")
    for part in parts:
        table.add_row(f"{part.number}", "", part.what, f"{part.minutes:.1f}", "")
        for step in part.steps:
            outcome = known.get(step.name)
            status = "" if outcome is None else outcome.status
            table.add_row("", step.name, f"  {step.what}", f"{step.seconds / 60:.1f}", status)
    return table


def carry_out(
    request: SliceRequest, console: Console, clock: Callable[[], float] = time.monotonic
) -> int:
    """Run a slice; returns the exit code: 0 where all is over and fine, 5 where a result is wrong,
    else 3."""
    deadline = clock() + request.seconds
    with opened(request.output) as book:
        try:
            for part in request.again:
                _void(part, book)
            ending = _slice(request, book, deadline, console, clock)
        except OSError as error:
            ending = (
                f"stopped, since {error.filename or request.output} cannot be written "
                f"({error.strerror}): make room; nothing that was measured is lost"
            )
        except KeyboardInterrupt:
            ending = "interrupted"
        return _conclude(request, book, ending, console)


def _void(part: GpuPart, book: OutcomeFile) -> None:
    last = last_outcomes(book.outcomes)
    for step in part.steps:
        before = last.get(step.name)
        if before is not None and before.status != "again":
            book.append(
                msgspec.structs.replace(
                    before,
                    status="again",
                    seconds=0.0,
                    sentence="asked for again",
                    started_at=_now(),
                )
            )


def _conclude(
    request: SliceRequest, book: OutcomeFile, ending: str | None, console: Console
) -> int:
    last = last_outcomes(book.outcomes)
    names = [step.name for part in request.parts for step in part.steps]
    outcomes = [last[name] for name in names if name in last]
    left = pending(request.parts, book.outcomes)
    statuses = [outcome.status for outcome in outcomes if outcome.status in OVER]
    counts = ", ".join(f"{statuses.count(name)} {name}" for name in OVER if name in statuses)
    say(console, f"{len(statuses)} of {len(names)} steps are over ({counts or 'none'})")
    if ending is not None:
        say(console, ending)
    if left:
        minutes = sum(step.seconds for _, step in left) / 60
        say(
            console,
            f"{counted(len(left), 'step')} left, about {minutes:.0f} minutes: the same command "
            "goes on",
        )
    if any(outcome.exit_code == exitcodes.WRONG for outcome in outcomes):
        return exitcodes.WRONG
    fine = not left and ending is None and set(statuses) <= {"ok", "skipped"}
    return exitcodes.OK if fine else exitcodes.INCOMPLETE


def _slice(
    request: SliceRequest,
    book: OutcomeFile,
    deadline: float,
    console: Console,
    clock: Callable[[], float],
) -> str | None:
    """Run what is pending and fits; why it ended before that, or None."""
    machine = _ask_machine(request, console)
    first = True
    for part, step in pending(request.parts, book.outcomes):
        last = last_outcomes(book.outcomes)
        if step.after and (step.after not in last or last[step.after].status not in OVER):
            continue
        left = deadline - clock() - _MARGIN_S
        needed = max(_LEAST_S, step.first_s) if step.resumes else step.seconds
        # A step that no slice is long enough for is tried once, by a slice that it has for itself.
        if left < (min(needed, _LEAST_S) if first else needed):
            continue
        files.check_writable(book.path, parents=True)
        first = False
        say(console, f"{part.number} {step.name}: {step.what}")
        while True:
            outcome = _run(request, part, step, book.outcomes, left, machine)
            if outcome.status != "ok":
                # A full disk is not what the step is about: it is run again when there is room.
                files.check_writable(book.path, parents=True)
            book.append(outcome)
            took = format_duration(outcome.seconds)
            say(console, f"  {outcome.status} after {took}: {outcome.sentence}")
            left = deadline - clock() - _MARGIN_S
            if not step.rows or outcome.status != "cut" or left < _LEAST_S:
                break
    return None


def _ask_machine(request: SliceRequest, console: Console) -> str:
    """The name of the machine's file, written if it is a new one.

    Raises UsageError where a GPU is needed and there is none.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            timeout=_PROBE_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        found = msgspec.json.decode(done.stdout, type=Environment)
    except (subprocess.SubprocessError, msgspec.MsgspecError) as error:
        say(console, f"the machine could not be asked what it is: {visible(str(error))[:SENTENCE]}")
        return ""
    if request.stage == "cuda" and found.gpu is None:
        raise UsageError(
            "PyTorch sees no GPU here: run this where there is one; --dry-run lists the parts"
        )
    content = files.as_json(found)
    name = hashlib.sha256(content).hexdigest()[:12]
    path = request.output / MACHINES / f"{name}.json"
    if not path.exists():
        with files.whole(path) as file:
            file.write(content)
    say(console, f"{found.gpu or found.cpu}, torch {found.versions.get('torch')}")
    return name


def _run(
    request: SliceRequest,
    part: GpuPart,
    step: GpuStep,
    before: Sequence[StepOutcome],
    left_s: float,
    machine: str,
) -> StepOutcome:
    """Run a step for at most so long."""
    started, began, since = _now(), time.monotonic(), time.time()

    def outcome(
        status: StepStatus, sentence: str, code: int | None = None, words: Sequence[str] = ()
    ) -> StepOutcome:
        return StepOutcome(
            part=part.number,
            step=step.name,
            status=status,
            exit_code=code,
            seconds=round(time.monotonic() - began, 3),
            sentence=visible(sentence)[:SENTENCE],
            command=list(words),
            started_at=started,
            machine=machine,
        )

    tool = ""
    if step.tool:
        found = _tool(step.tool)
        if found is None:
            return outcome("skipped", f"{step.tool} is not installed here: it is part of CUDA")
        tool = found
    spent_s = _spent_s(step, before)
    limit_s = min(step.limit_s - spent_s, step.turn_s, left_s)
    # What is under way when the budget is spent is still written down.
    budget_s = 1.0 if step.heaviest else limit_s - step.first_s
    again = _last_status(step, before) == "again"
    if again and step.rows:
        _put_away(request.output, step.rows)
    words = command_of(request, step, tool, budget_s=budget_s, again=again)
    log = request.output / "logs" / f"{step.name}.txt"
    size = _size(request.output, step)
    with contextlib.ExitStack() as stack:
        paths = [os.path.abspath(step.path)] if step.path else []
        if step.tuned:
            try:
                paths.insert(0, str(stack.enter_context(_with_table(request.output / TABLE_FILE))))
            except (OSError, ValueError) as error:
                return outcome("skipped", f"there is no table of launches to read: {error}")
        # A step with a budget ends itself; it is killed where it does not.
        longest_s = limit_s + (_MARGIN_S - _GRACE_S if step.resumes else 0.0)
        try:
            code = _waited(words, log, environment_of(request, paths), longest_s)
        except _NotStarted as error:
            return outcome("failed", str(error), words=words)
    printed = tail(log)
    said = last_line(printed) or "it printed nothing"
    if code is not None and code < 0:
        said = f"ended by {_signal_name(-code)}: {said}"
    ended = code is None
    if step.resumes and code in (exitcodes.OK, exitcodes.INCOMPLETE):
        ended = SPENT in printed and not step.heaviest
        if SPENT in printed and step.heaviest:
            code = exitcodes.OK  # what became of the block its rows say
    if ended and limit_s == step.limit_s - spent_s:
        status: StepStatus = "ok" if step.endless and code is not None else "timeout"
        return outcome(
            status, f"its {format_duration(step.limit_s)} are spent: {said}", code, words
        )
    if step.rows and (ended or code != exitcodes.OK):
        # What it was at is left out by the next call, if it got so far.
        if _size(request.output, step) > size:
            return outcome("cut", f"goes on after this: {said}", code, words)
        return outcome("timeout" if ended else "failed", said, code, words)
    if ended and (step.resumes or _last_status(step, before) != "cut"):
        return outcome("cut", f"cut off by the end of the slice: {said}", code, words)
    if ended:
        took = format_duration(limit_s)
        return outcome("timeout", f"not done in two slices, {took} this time: {said}", code, words)
    if step.keep and code == exitcodes.OK:
        _keep(request.output, step.keep, since)
    return outcome("ok" if code == exitcodes.OK else "failed", said, code, words)


def command_of(
    request: SliceRequest, step: GpuStep, tool: str, *, budget_s: float, again: bool
) -> list[str]:
    """The words of a step's command."""
    known = {"python": sys.executable, "output": str(request.output), "tool": tool}
    words = [
        known[word[1:-1]] if word[:1] == "{" and word[-1:] == "}" else
        word.replace("{output}", known["output"])
        for word in step.words
    ]  # fmt: skip
    if step.resumes:
        words += ["--time-budget", step.budget.format(max(1, int(budget_s)))]
    if step.run and (request.output / step.run / "plan.json").exists():
        words += ["--resume", *(["--retry-failed"] if again else [])]
    return words


def environment_of(request: SliceRequest, paths: Sequence[str]) -> dict[str, str]:
    """The variables of a step: kernels compiled on a GPU; slices on machines that come and go under
    other names are those of one machine, named after the output folder."""
    before = os.environ
    joined = os.pathsep.join([*paths, *filter(None, [before.get("PYTHONPATH")])])
    name = before.get("RESBLOCK_BENCH_MACHINE") or request.output.resolve().name
    variables = {
        "TRITON_INTERPRET": "0" if request.stage == "cuda" else "1",
        "RESBLOCK_BENCH_MACHINE": name,
        "PYTHONUNBUFFERED": "1",
    }
    return {**before, **variables, **({"PYTHONPATH": joined} if joined else {})}


def _waited(
    words: Sequence[str], log: Path, variables: Mapping[str, str], limit_s: float
) -> int | None:
    """The exit code of a command, whose output is appended to a file; None where it was stopped.

    It and all that it starts ends with this process.
    """
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(shlex.join(words).split())}\n".encode())
        file.flush()
        parent = os.getpid()
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(variables),
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        except OSError as error:
            raise _NotStarted(f"{words[0]} cannot be started ({error.strerror})") from None
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Tell a process that still runs to end, then kill it; and what it has left of its group."""
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    if child.poll() is None:
        end_tree(child.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_REAP_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _tool(name: str) -> str | None:
    """The path of a program of CUDA, also where it is not on the PATH: in the toolkit, or in one of
    the packages that PyTorch brings."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    homes = [*map(Path, ("/usr/local/cuda", "/opt/cuda")), *packages.glob("*")]
    if "CUDA_HOME" in os.environ:
        homes.insert(0, Path(os.environ["CUDA_HOME"]))
    folders = [str(home / part) for home in homes for part in ("bin", name)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


@contextlib.contextmanager
def _with_table(table: Path) -> Iterator[Path]:
    """A folder for the Python path, in which the kernels have this table of launches.

    Raises OSError where there is none, ValueError where it is none.
    """
    found = tuned.read(table)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "resblock_bench"
        package.mkdir()
        for name in ("bench", "reference"):
            (package / name).symlink_to(package_folder(name))
        shutil.copytree(package_folder("kernels"), package / "kernels")
        tables = package / "kernels" / tuned.FOLDER.name
        tables.mkdir(exist_ok=True)
        shutil.copy(table, tables / f"{found.arch}.json")
        yield Path(folder)


def _keep(output: Path, pattern: str, since: float) -> None:
    """Copy what has been written since a time: a checkout has other machines' files, too."""
    folder = output / "calibration"
    for path in checkout_around(Path.cwd()).glob(pattern):
        if path.stat().st_mtime >= since:
            shutil.copy(path, folder / path.name)


def _size(output: Path, step: GpuStep) -> int:
    """Bytes of the rows of a step."""
    path = output / step.rows
    return path.stat().st_size if step.rows and path.exists() else 0


def _put_away(output: Path, name: str) -> None:
    """Rows that do not count any more, for which their program would else find nothing to do."""
    path = output / name
    if path.exists():
        path.replace(output / "earlier" / f"{_now().replace(':', '')}-{name}")


def _last_status(step: GpuStep, before: Sequence[StepOutcome]) -> StepStatus | None:
    last = last_outcomes(before).get(step.name)
    return None if last is None else last.status


def _spent_s(step: GpuStep, before: Sequence[StepOutcome]) -> float:
    """Of a step that was cut off: what it has had since it began."""
    spent = 0.0
    for outcome in before:
        if outcome.step == step.name:
            spent = spent + outcome.seconds if step.resumes and outcome.status == "cut" else 0.0
    return spent


def tail(log: Path) -> str:
    """The end of what a command printed."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return file.read().decode(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
    return ""


_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ORNAMENT = re.compile(r"^[\W_]+|[\s=│┃|]+$")
_TELLING = (
    re.compile(r"^=+ .*\bin [\d.]+s\b.* =+$|^\d+ \w+.* in [\d.]+s\b"),  # of pytest
    re.compile(r"^resblock-bench: "),
    re.compile(r"^\d+ of \d+ cells?: "),
    re.compile(r"^=+ (ERROR|RACECHECK) SUMMARY"),  # of compute-sanitizer
    re.compile(r"^[\w.]*(Error|Exception)\b"),
)
"""Lines that say more than what is printed after them, first those that say most."""


def last_line(text: str) -> str:
    """The line that says what became of a command: the last of a telling kind, or the last."""
    lines = [_ESCAPE.sub("", line).rstrip() for line in text.splitlines()]
    found = [line for kind in _TELLING for line in lines[::-1] if kind.search(line)]
    for line in [*found, *lines[::-1]]:
        said = _ORNAMENT.sub("", line).removeprefix("resblock-bench: ")
        if re.search(r"\w\w", said):
            return said[:SENTENCE]
    return ""


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
