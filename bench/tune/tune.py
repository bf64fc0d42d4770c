"""Measures launch choices on this machine's GPU and writes the table that the kernels read.

For every bucket of calls (tuned.Bucket), heaviest first: the rules' own choice, then others that
`tiers.shape` accepts. A choice is refused that fails to launch, leaves an element unwritten, errs
by more than eager PyTorch allows, or does not repeat to the bit. What is left is timed, and the
fastest replaces the rules' choice where it beats it by more than the noise, twice. Otherwise the
entry holds the rules' choice, which says that it was measured and is as good.

The table is written anew after every bucket, so whatever ends the run keeps what was measured.
"""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from resblock_bench.bench import exitcodes, files
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.machine import environment
from resblock_bench.bench.machine.proc import usable_cpus
from resblock_bench.bench.progress import TaskProgress
from resblock_bench.bench.terminal import say
from resblock_bench.kernels import tuned
from resblock_bench.kernels.tiers import QUAD
from resblock_bench.kernels.tuned import Bucket, Entry

from .bucket import BucketOutcome, measure
from .choices import bucket_name, buckets
from .gpu import Bench, DeviceLost, open_gpu
from .report import finished, show


@dataclass(frozen=True)
class TuneRequest:
    """A tuning run as asked for. output None: the table that the kernels read."""

    planned: list[PlannedCell]
    output: Path | None = None
    budget_s: float | None = None
    seed: int = 0


def read_table(path: Path, arch: str) -> dict[Bucket, Entry]:
    """The entries of an earlier run, by bucket. Raises UsageError where they cannot be kept."""
    if not path.exists():
        return {}
    try:
        found = tuned.decoded(files.read(path), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give another --output") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    if found.arch != arch:
        raise UsageError(
            f"{path} was measured on {found.arch}, and this GPU is {arch}: give another --output"
        )
    return {entry.bucket: entry for entry in found.entries}


def write_table(path: Path, found: tuned.Table) -> None:
    """Write a table whole or not at all, one line an entry. Raises OSError."""
    head = msgspec.json.encode(msgspec.structs.replace(found, entries=[])).decode()
    head = msgspec.json.format(head, indent=2).removesuffix("[]\n}")
    lines = ",\n".join(f"    {msgspec.json.encode(entry).decode()}" for entry in found.entries)
    text = f"{head}[\n{lines}\n  ]\n}}\n" if lines else f"{head}[]\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path, named=True) as file:
        file.write(text.encode())


def tune(
    request: TuneRequest,
    console: Console,
    bench: Bench | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure the buckets of a request; returns the exit code.

    bench   None opens the GPU; raises UsageError where there is none
    clock   seconds, for the time budget

    Buckets that the table does not have come first, so that runs with a short budget add up.
    Ctrl-C ends the run as in `sweep.carry_out`, with the table as it stands.
    """
    bench = open_gpu() if bench is None else bench
    path = request.output or tuned.path_of(bench.arch)
    with files.explained(path, "give an --output that is writable"):
        files.check_writable(path, named=True, parents=True)
    entries = read_table(path, bench.arch)
    works = sorted(buckets(request.planned), key=lambda work: work.bucket in entries)
    if not works:
        raise UsageError(f"no norm of the selection has {QUAD} positions: give a larger resolution")
    head = _head(bench)
    say(console, f"{len(works)} buckets of calls on {bench.name} ({bench.arch}) into {path}")

    outcomes: list[BucketOutcome] = []
    ending: str | None = None
    lost = False
    started = clock()

    def expired() -> bool:
        return request.budget_s is not None and clock() - started >= request.budget_s

    try:
        with TaskProgress(console, len(works)) as progress:
            for work in works:
                if expired():
                    break
                progress.begin(bucket_name(work.bucket))
                before = entries.get(work.bucket)
                outcome = measure(
                    bench,
                    work,
                    seed=request.seed,
                    known=None if before is None else before.choice,
                    expired=expired,
                )
                if _enter(entries, outcome):
                    write_table(path, _table(head, entries))
                outcomes.append(outcome)
                progress.finish(finished(outcome))
    except KeyboardInterrupt:
        ending = "interrupted"
    except OSError as error:
        ending = f"stopped, since {path} cannot be written ({error.strerror})"
    except DeviceLost as error:
        ending, lost = f"stopped: {error}, and the GPU runs nothing more in this process", True
    tuned.forget()

    left = len(works) - sum(not outcome.cut_short for outcome in outcomes)
    if ending is None and left:
        ending = "stopped, since the time budget is spent"
    show(console, outcomes, len(works))
    if ending is not None:
        say(console, f"{ending}: {path} has what was measured, {left} buckets are left")
    if lost:
        say(
            console,
            "Please report this launch. To measure the rest, select blocks (-a) without its bucket",
        )
        return bench.give_up(_exit_code(outcomes, ending))
    return _exit_code(outcomes, ending)


def _enter(entries: dict[Bucket, Entry], outcome: BucketOutcome) -> bool:
    """Take over what was found; whether the table has changed.

    An entry that an earlier run made, and this one refuses, goes even where none replaces it.
    """
    bucket = outcome.work.bucket
    if outcome.entry is not None:
        entries[bucket] = outcome.entry
        return True
    before = entries.get(bucket)
    if before is not None and any(before.choice == refused.choice for refused in outcome.refused):
        del entries[bucket]
        return True
    return False


def _head(bench: Bench) -> tuned.Table:
    """An empty table with the machine and the commit."""
    found = environment.gather(usable_cpus())
    machine = {"gpu": bench.name, "driver": found.gpu_driver or "unknown"}
    for package in ("torch", "triton", "cuda"):
        machine[package] = found.versions.get(package) or "unknown"
    commit = (found.commit or "unknown") + ("-dirty" if found.dirty else "")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return tuned.Table(arch=bench.arch, machine=machine, commit=commit, measured_at=now, entries=[])


def _table(head: tuned.Table, entries: dict[Bucket, Entry]) -> tuned.Table:
    ordered = [entries[bucket] for bucket in sorted(entries)]
    return msgspec.structs.replace(head, entries=ordered)


def _exit_code(outcomes: Sequence[BucketOutcome], ending: str | None) -> int:
    if any(outcome.rules_are_wrong for outcome in outcomes):
        return exitcodes.WRONG
    # A bucket that memory does not hold is a result, as in `run`.
    failed = any(outcome.problem is not None and outcome.refused for outcome in outcomes)
    if ending is not None or failed or not any(outcome.entry for outcome in outcomes):
        return exitcodes.INCOMPLETE
    return exitcodes.OK
