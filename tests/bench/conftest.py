"""Tiny cells, a fast session, a command line in this process, and a block that is wrong."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
from support.cells import TINY
from support.kept_workers import KeptWorkers
from support.models import CONFIGS, model_cell, register
from support.orders import Given
from torch import nn

from resblock_bench.bench.cli import main as cli
from resblock_bench.bench.grid.grid import PlannedCell
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.machine import environment, workers
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.measure import cell as measuring
from resblock_bench.bench.measure.cell import CellJob, Task
from resblock_bench.bench.measure.correctness import LAST_INPUTS, compute_truth
from resblock_bench.bench.measure.devices import open_device
from resblock_bench.bench.measure.implementations import IMPLEMENTATIONS
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.measure.timing import DEFAULT_RULE
from resblock_bench.bench.measure.truth_file import FIRST, LAST, truths_folder, write_truth
from resblock_bench.bench.measure.workload import checked_cell, unsupported
from resblock_bench.bench.profile import step
from resblock_bench.bench.profile.profiles import Profile
from resblock_bench.bench.records import Ceilings, Cell, Correctness, Environment, Row, site_of
from resblock_bench.bench.sweep import engines

FAST = msgspec.structs.replace(
    DEFAULT_RULE,
    warmup_s=0.0,
    warmup_max_s=0.0,
    warmup_min_steps=1,
    min_samples=6,
    max_samples=6,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and lose much where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture
def make_cell() -> Callable[..., Cell]:
    """A tiny cell with some fields changed."""
    return lambda **changes: msgspec.structs.replace(TINY, **changes)


@pytest.fixture(scope="session")
def found() -> Environment:
    """This machine."""
    return environment.gather(1)


def tiny_task(found: Environment, **changes: object) -> Task:
    """The task of a tiny cell; fields of the task or of the cell changed."""
    task = Task(
        cell=TINY,
        multiplicity=1,
        attempt=1,
        device="cpu",
        rule=FAST,
        seed=0,
        environment=found,
        memory_limit_bytes=None,
        folder=None,
    )
    own = {name: changes.pop(name) for name in list(changes) if name in Task.__struct_fields__}
    return msgspec.structs.replace(task, cell=msgspec.structs.replace(TINY, **changes), **own)


def truths_of(task: Task, folder: Path) -> Path:
    """The folder of a task's truths within another, computed when they are first asked for."""
    truths = truths_folder(folder, task.cell, task.seed)
    if not truths.exists():
        site, device = checked_cell(site_of(task.cell)), torch.device("cpu")
        truths.mkdir()
        for name, seed in ((FIRST, task.seed), (LAST, task.seed + LAST_INPUTS)):
            write_truth(truths / name, compute_truth(site, device, task.seed, seed))
    return truths


def row_of_task(task: Task, folder: Path, channel: Channel | None = None) -> Row:
    """Measured in this process; truths are in `folder`."""
    reason = unsupported(task.cell)
    if reason is not None:
        return measuring.row_of(task, "skipped", reason)
    job = CellJob(task=task, truths=str(truths_of(task, folder)))
    return measuring.measure(job, channel or Given())


@pytest.fixture
def make_task(found: Environment) -> Callable[..., Task]:
    """The task of a tiny cell; fields of the task or of the cell changed."""
    return functools.partial(tiny_task, found)


@pytest.fixture
def plan(make_task: Callable[..., Task]) -> Plan:
    """Of a run of one tiny cell."""
    task = make_task()
    cells = [PlannedCell(task.cell, 1)]
    return Plan(
        device="cpu", rule=task.rule, seed=0, threads=None, memory_limit_bytes=None, cells=cells
    )


@pytest.fixture
def measure_task(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Row]:
    """The row of a task, measured in this process; by the orders of a channel, if one is given."""
    return lambda task, channel=None: row_of_task(task, tmp_path_factory.getbasetemp(), channel)


@pytest.fixture(scope="session")
def some_row(found: Environment, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Row]:
    """The row of a tiny cell in one mode, for tests that need some: measured once for all."""
    folder = tmp_path_factory.getbasetemp()
    return functools.cache(lambda mode: row_of_task(tiny_task(found, mode=mode), folder))


@pytest.fixture
def measure(make_task: Callable[..., Task], measure_task: Callable[..., Row]) -> Callable[..., Row]:
    """The row of a tiny cell with some fields changed."""
    return lambda **changes: measure_task(make_task(**changes))


@pytest.fixture
def add_implementation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register the reference under another name, with a hook around its call or other parts."""

    def add(name: str, around: Callable[..., torch.Tensor] | None = None, **parts: object) -> None:
        reference = IMPLEMENTATIONS["reference"]
        if around is not None:

            def wrap(module: nn.Module, cell: Cell) -> Callable[..., torch.Tensor]:
                return lambda x, emb: around(module, x, emb)

            parts["wrap"] = wrap
        fields = {**vars(reference), **parts}
        monkeypatch.setitem(IMPLEMENTATIONS, name, type(reference)(**fields))

    return add


@pytest.fixture
def shared_workers(monkeypatch: pytest.MonkeyPatch, kept_workers: KeptWorkers) -> None:
    """Whatever asks workers asks those of all tests."""
    monkeypatch.setattr(workers, "run", kept_workers.run)


CEILINGS = Ceilings(
    copy_bytes_per_s=1e10,
    peak_bytes_per_s=2e10,
    matrix_flops_per_s=dict.fromkeys(("fp32", "bf16", "fp16"), 1e11),
)
OUT_OF_REACH = Ceilings(
    copy_bytes_per_s=1e13,
    peak_bytes_per_s=1e13,
    matrix_flops_per_s=dict.fromkeys(("fp32", "bf16", "fp16"), 1e15),
)
"""Of a machine on which no row is impossible."""
CHECKED = Correctness(errors={"out": 0.0}, limits={"out": 1.0}, worst="out", dropout=0.0)


@pytest.fixture(scope="session")
def known_profiles() -> dict[Cell, Profile]:
    """Those that were made: none twice."""
    return {}


@pytest.fixture
def profiled(
    make_task: Callable[..., Task],
    make_cell: Callable[..., Cell],
    known_profiles: dict[Cell, Profile],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Profile]:
    """The profile of a tiny block, or with a workload of a tiny model, with some fields changed,
    made in this process."""
    monkeypatch.setattr(step, "STEPS", 1)
    register(monkeypatch, CONFIGS["unet"])

    def profile(**changes: object) -> Profile:
        whole = "workload" in changes
        cell = model_cell(CONFIGS["unet"], **changes) if whole else make_cell(**changes)
        if cell not in known_profiles:
            task = make_task()
            environment_ = msgspec.structs.replace(task.environment, ceilings=CEILINGS)
            task = msgspec.structs.replace(task, cell=cell, environment=environment_)
            device = open_device("cpu", 1)
            workload = KINDS[cell.workload].drawn(cell, device.torch_device, 0)
            recorded = step.recorded_step(workload, device, lambda: None)
            counted = step.counted_step(workload, device)
            known_profiles[cell] = step.profile_of(task, CHECKED, recorded, counted, 0, [])
        return known_profiles[cell]

    return profile


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def one_survey() -> Callable[..., Environment]:
    """A survey that looks at each kind of machine once, and measures no ceilings: they take
    seconds."""
    known: dict[str, Environment] = {}

    def surveyed(processes: Processes, job: SurveyJob, variables: object = None) -> Environment:
        kind = f"{job} {variables}"
        if kind not in known:
            found = survey(processes, msgspec.structs.replace(job, ceilings=False), variables)
            ceilings = OUT_OF_REACH if job.ceilings else None
            known[kind] = msgspec.structs.replace(found, ceilings=ceilings)
        return msgspec.structs.replace(known[kind], machine=environment.machine_name())

    return surveyed


@pytest.fixture
def run_cli(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    one_survey: Callable[..., Environment],
) -> Callable[..., Outcome]:
    """Run the command line in this process."""
    monkeypatch.setattr(engines, "survey", one_survey)

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as ending:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = ending.value.code
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
