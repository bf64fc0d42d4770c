"""The process of one side of a comparison: forks a fresh process a round, which takes orders.

    python -m resblock_bench.bench.lockstep.side FD CPUS BEGAN ROOT [FOLDER…]

Which code is measured is decided by what this interpreter imports. It imports all of this suite
once and touches no device, so that a round begins in milliseconds and yet clean; what other
packages offer, which may do so, each round imports for itself. Orders come and answers go as JSON
over the socket FD; what the two print goes where their output goes. Rounds compute on the CPUs
whose numbers are given with commas, on any if none are. Where folders are named, the code that is
measured has to come from them: the package that offers it, and all of the repository ROOT. None of
it may be newer than the moment BEGAN, in seconds since 1970.
"""

import os
import sys
import traceback
from collections.abc import Collection, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from resblock_bench.bench.machine.parent import die_with_parent
from resblock_bench.bench.machine.proc import personality
from resblock_bench.bench.measure import preload  # noqa: F401
from resblock_bench.bench.measure.cell import Checked, Task, checked_workload, reason_of, status_of
from resblock_bench.bench.measure.devices import Device, open_device
from resblock_bench.bench.measure.fingerprint import code_fingerprint
from resblock_bench.bench.measure.implementations import IMPLEMENTATIONS, packages_of
from resblock_bench.bench.measure.telemetry import open_probe
from resblock_bench.bench.measure.timing import Sampler

from . import orders


def main() -> None:
    """Serve rounds until the other end of the socket is closed."""
    socket: Connection = Connection(int(sys.argv[1]))
    die_with_parent()
    if sys.argv[2]:
        os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
    _answer(socket, orders.Up(code_fingerprint(), bool(personality() & orders.ADDR_NO_RANDOMIZE)))
    while True:
        try:
            message = socket.recv_bytes()
        except (EOFError, OSError):
            return
        order = msgspec.json.decode(message, type=orders.Order)
        if not isinstance(order, orders.Open):
            continue  # for a round that has ended meanwhile, which was said
        pid = os.fork()
        if pid == 0:
            _round(socket, order)
        _, status = os.waitpid(pid, 0)
        _answer(socket, orders.Ended(os.waitstatus_to_exitcode(status)))


def _answer(socket: Connection, answer: orders.Reply) -> None:
    socket.send_bytes(msgspec.json.encode(answer))


def _round(socket: Connection, order: orders.Open) -> NoReturn:
    """The life of a round's process."""
    code = 1
    try:
        die_with_parent()
        _serve(socket, order)
        code = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        code = 0  # the comparison was ended
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(socket: Connection, order: orders.Open) -> None:
    task = order.task
    device = open_device(task.device, task.environment.threads)
    try:
        checked = _prepared(task, Path(order.truth), device)
    except Exception as error:
        _answer(socket, orders.Opened(status_of(error), reason_of(error)))
        return
    if checked.verdict.status != "ok":
        _answer(socket, orders.Opened(checked.verdict.status, checked.verdict.reason))
        return
    workload = checked.workload
    probe = open_probe(device.kind, device.uuid)
    sampler = Sampler(workload.step, device.timer, prepare=workload.reset)
    torch.manual_seed(task.seed)  # the masks of dropout
    sampler.warm_up(task.rule)
    _answer(socket, orders.Opened("ok", None))
    while True:
        match msgspec.json.decode(socket.recv_bytes(), type=orders.Order):
            case orders.Burst(seconds):
                _answer(socket, orders.Samples(list(sampler.burst(seconds))))
            case orders.Read():
                _answer(socket, orders.Counters(probe.source, probe.read()))
            case _:
                probe.close()
                return


def _prepared(task: Task, truth: Path, device: Device) -> Checked:
    before = set(sys.modules)
    reason = IMPLEMENTATIONS[task.cell.impl].unusable(task.device)
    if reason is not None:
        raise RuntimeError(reason)
    checked = checked_workload(task, truth, device)
    began, root, *folders = sys.argv[3:]
    if folders:
        _refuse_strays(packages_of(task.cell.impl), before, root, folders)
        _refuse_changed(before, folders, float(began))
    return checked


def _refuse_strays(
    packages: Sequence[str], before: Collection[str], root: str, folders: Sequence[str]
) -> None:
    """An installed package stands in for what the folders lack, and both sides would import it."""
    for name, file in _files():
        measured = any(name == package or name.startswith(f"{package}.") for package in packages)
        # What an environment within the repository holds is not the repository's.
        installed = "site-packages" in Path(file).parts
        own = name not in before and _within(file, [root]) and not installed
        if (measured or own) and not _within(file, folders):
            raise RuntimeError(
                f"{name} was imported from {file}, not from {' or '.join(folders)}: this side "
                "lacks it, or --source does not name the folder that it is imported from"
            )


def _refuse_changed(before: Collection[str], folders: Sequence[str], began: float) -> None:
    """What is imported anew in every round has to be the same in all of them."""
    for name, file in _files():
        if name not in before and _within(file, folders) and os.stat(file).st_mtime > began:
            raise RuntimeError(f"{file} changed meanwhile: compare again")


def _files() -> list[tuple[str, str]]:
    """Of all modules: names and files."""
    files = ((name, getattr(module, "__file__", None)) for name, module in sys.modules.items())
    return [(name, file) for name, file in files if file is not None]


def _within(file: str, folders: Sequence[str]) -> bool:
    return any(folder and file.startswith(f"{folder}{os.sep}") for folder in folders)


if __name__ == "__main__":
    main()
