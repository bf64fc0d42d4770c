"""What runs under which torch and Triton: others are unpacked beside the locked ones, and tried.

    python tests/versions.py            everything, about an hour on two cores
    python tests/versions.py --short    the oldest and the newest, for every commit
    python tests/versions.py --only 3.9.0 --only sm_90

Every variant of the kernels (kernel_variants.py) is compiled by the Tritons of `COMPILING`, and by
the newest on the registry, for each architecture; the tests of the kernels and of the reference run
under the `PAIRS` (kernels/versions.py has both). What a version cannot do is in IMPOSSIBLE and is
said; anything else that fails makes the exit code 1.

The versions are unpacked into .versions, once: about 1 GB for a Triton and 5 GB for a torch, which
comes with CUDA's libraries and runs on a CPU nevertheless.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer
from kernel_variants import Compiled
from rich.console import Console
from rich.table import Table

from resblock_bench.bench.compiled.machine_code import ARCHITECTURES
from resblock_bench.bench.machine.proc import usable_cpus
from resblock_bench.kernels.versions import COMPILING, LOCKED, PAIRS, Pair

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"

IMPOSSIBLE = {("3.2.0", 100): "its ptxas is of CUDA 12.4, which does not know sm_100"}
"""What a Triton cannot compile for, and why."""

# Triton's interpreter takes arrays of one element for scalars, which NumPy from 2.4 on refuses.
OLD_NUMPY = "numpy==2.2.6"
FIRST_FOR_NEW_NUMPY = (3, 7)

SHORT_ARCH = 90
SHORT_TESTS = [
    "tests/kernels/test_operator.py",
    "-k",
    "test_options and silu or test_several_tiles",
]
SHORT_PAIR = Pair(LOCKED.torch, "3.6.0")


class Row(NamedTuple):
    """One line of the table. failure: the details of what must not happen."""

    what: str
    under: str
    found: str
    seconds: float
    failure: str | None = None


class Step(NamedTuple):
    """What to do and under which versions, the packages that it needs, and the doing of it."""

    what: str
    under: str
    packages: tuple[str, ...]
    run: Callable[[list[Path]], tuple[str, str | None]]


def newest() -> str:
    """The newest Triton that the registry has for this Python and platform."""
    done = _run([sys.executable, "-m", "pip", "index", "versions", "triton"], {})
    match = re.search(r"^triton \(([\d.]+)\)", done.stdout, re.MULTILINE)
    if match is None:
        raise SystemExit(f"pip does not tell the newest Triton on the registry: {done.stderr}")
    return match[1]


def steps(newest_triton: str, short: bool, processes: int) -> Iterator[Step]:
    tritons = [COMPILING[0], SHORT_PAIR.triton] if short else COMPILING
    for triton in dict.fromkeys([*tritons, newest_triton]):
        pair = Pair(LOCKED.torch, triton)
        packages, under = _packages(pair), f"triton {triton}"
        for arch in [SHORT_ARCH] if short else ARCHITECTURES:
            run = partial(compiled, pair, arch, short, processes)
            yield Step(f"compile for sm_{arch}", under, packages, run)
        if not short:
            run = partial(tested, ["tests/bench/compiled/test_machine_code.py"], pair, processes)
            yield Step("read machine code", under, packages, run)
    for pair in [SHORT_PAIR] if short else PAIRS:
        # The reference imports no Triton: with the locked torch `make test` has run its tests.
        folders = ["tests/kernels", *(["tests/reference"] if pair.torch != LOCKED.torch else [])]
        tests = SHORT_TESTS if short else folders
        packages, under = _packages(pair), f"torch {pair.torch}, triton {pair.triton}"
        run = partial(tested, tests, pair, processes)
        yield Step(" ".join(tests), under, (*_numpy(pair.triton), *packages), run)


def _packages(pair: Pair) -> tuple[str, ...]:
    """What to unpack for a pair, if anything: a torch brings its own Triton along."""
    if pair.torch != LOCKED.torch:
        return (f"torch=={pair.torch}",)
    return () if pair == LOCKED else (f"triton=={pair.triton}",)


def _numpy(triton: str) -> tuple[str, ...]:
    """What NumPy to unpack for the interpreter of a Triton, if not the locked one."""
    known = tuple(int(part) for part in triton.split(".")[:2]) >= FIRST_FOR_NEW_NUMPY
    return () if known else (OLD_NUMPY,)


def unpack(package: str) -> Path:
    """The folder of a package, filled if it is not there. A torch comes with what it needs."""
    folder = FOLDER / package.replace("==", "-")
    if folder.is_dir():
        return folder
    part = folder.with_suffix(".part")
    needs = [] if package.startswith("torch") else ["--no-deps"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = _run([*command, *needs, "--upgrade", "--target", str(part), package], {})
    if done.returncode != 0:
        raise SystemExit(f"pip cannot unpack {package}: {done.stderr[-2000:]}")
    part.rename(folder)
    return folder


def compiled(
    pair: Pair, arch: int, short: bool, processes: int, paths: list[Path]
) -> tuple[str, str | None]:
    """All kernel variants, compiled by the Triton of the pair, which is at the head of `paths`."""
    command = [sys.executable, "tests/kernel_variants.py", "--arch", str(arch)]
    command += ["--processes", str(processes), *(["--short"] if short else [])]
    environ = {"TRITON_CACHE_DIR": str(FOLDER / "compiled"), "TRITON_INTERPRET": "0"}
    _must_be(pair, paths)
    done = _run(command, environ, paths)
    if done.returncode != 0:
        return "failed", done.stderr[-3000:]
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=Compiled)
    return judged(found, IMPOSSIBLE.get((pair.triton, arch)))


def judged(found: Compiled, reason: str | None) -> tuple[str, str | None]:
    """What to print of an architecture, and what is wrong with it; `reason` is IMPOSSIBLE's."""
    if found.impossible is not None:
        declared = reason and f"impossible: {reason}"
        return declared or "impossible", None if declared else found.impossible
    if reason is not None:
        return "compiles", f"declared impossible ({reason}): strike it from IMPOSSIBLE"
    text = f"{found.count - len(found.failed)} of {found.count} variants"
    if not found.failed and found.count:
        return text, None
    return text, "\n".join(f"{name}: {error}" for name, error in found.failed.items()) or "none"


def tested(
    tests: list[str], pair: Pair, processes: int, paths: list[Path]
) -> tuple[str, str | None]:
    """Tests in the interpreter, with `paths` before everything that is installed."""
    _must_be(pair, paths)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-n", str(processes), *tests]
    environ = {"TRITON_INTERPRET": "1", "MKL_NUM_THREADS": "1"}
    done = _run([*command, "--dist", "worksteal"], environ, paths)
    last = (done.stdout.strip().splitlines() or ["pytest printed nothing"])[-1]
    return last.strip("= "), None if done.returncode == 0 else (done.stdout + done.stderr)[-6000:]


def _must_be(pair: Pair, paths: list[Path]) -> None:
    """Make sure that nothing else is imported: a result for another version would be worthless."""
    code = "from importlib.metadata import version as v; print(v('torch'), v('triton'))"
    found = _run([sys.executable, "-c", code], {}, paths).stdout.split()
    if [name.partition("+")[0] for name in found] != list(pair):
        raise SystemExit(
            f"torch and triton would be {' and '.join(found)}, and not {' and '.join(pair)}: "
            f"remove {FOLDER}, run make install, and start again."
        )


def _run(
    command: list[str], environ: dict[str, str], paths: list[Path] | None = None
) -> subprocess.CompletedProcess[str]:
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, paths or []), *([before] if before else [])])
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def table(rows: list[Row]) -> Table:
    shown = Table("what", "under", "found", "s", title="versions")
    for row in rows:
        style = None if row.failure is None else "bold red"
        shown.add_row(row.what, row.under, row.found, f"{row.seconds:.0f}", style=style)
    return shown


def main(
    short: Annotated[bool, typer.Option("--short", help="A part of it, in one minute.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Steps whose name or versions have all of these.")
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove each version as soon as it has been tried.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1)] = usable_cpus(),
) -> None:
    console = Console()
    chosen = [
        step
        for step in steps(newest(), short, processes)
        if all(word in f"{step.what}, {step.under}" for word in only or [])
    ]
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for i, step in enumerate(chosen):
        folders = [unpack(package) for package in step.packages]
        began = time.monotonic()
        found, failure = step.run(folders)
        row = Row(step.what, step.under, found, time.monotonic() - began, failure)
        rows.append(row)
        console.print(f"{row.what}, {row.under}: {row.found}", highlight=False, markup=False)
        later = {package for other in chosen[i + 1 :] for package in other.packages}
        for package in set(step.packages) - later if forget else ():
            shutil.rmtree(unpack(package))
    console.print(table(rows))
    wrong = [row for row in rows if row.failure is not None]
    for row in wrong:
        console.print(f"\n{row.what}, {row.under}:\n{row.failure}", highlight=False, markup=False)
    raise typer.Exit(1 if wrong or not rows else 0)


if __name__ == "__main__":
    typer.run(main)
