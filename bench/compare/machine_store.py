"""What is kept of each machine: its calibration, and its baseline with the earlier ones.

results/baselines/<machine>/calibration-<device>-<threads>.json
                            timing.json
                            history/<when it was saved>-timing.json
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.records import Environment
from resblock_bench.bench.runs.folder import repository_root

TIMING = "timing.json"
_HISTORY = "history"
_ROOM = 1 << 16  # bytes; more than is ever kept of a gate's cells


def machine_folder(machine: str, start: Path) -> Path:
    """The folder of a machine in the repository around `start`."""
    return repository_root(start) / "results" / "baselines" / machine


def calibration_file(environment: Environment, device: Kind, start: Path) -> Path:
    """The calibration of a machine's device, with as many threads."""
    folder = machine_folder(environment.machine, start)
    return folder / f"calibration-{device}-{environment.threads}.json"


def writable(path: Path) -> None:
    """Raises UsageError where `write` would: what takes minutes to measure is not to be lost."""
    with _explained(path):
        _temporary(path).write_bytes(b" " * _ROOM)
        _temporary(path).unlink()


def write(path: Path, content: msgspec.Struct, *, keep: str | None = None) -> None:
    """Write a file whole or not at all.

    keep   the moment at which the present content was saved: it goes into the history under it

    Raises UsageError where it cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
    with _explained(path):
        _temporary(path).write_bytes(data)
        if keep is not None:
            history = path.parent / _HISTORY
            history.mkdir(exist_ok=True)
            path.replace(history / f"{re.sub('[^0-9A-Za-z]', '', keep)}-{path.name}")
        _temporary(path).replace(path)


def _temporary(path: Path) -> Path:
    return path.with_suffix(".tmp")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """In the file's folder; nothing half-written is left behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            _temporary(path).unlink()
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): free it, or run in another folder"
        ) from None


def history(path: Path) -> list[Path]:
    """The earlier versions of a file, oldest first."""
    return sorted((path.parent / _HISTORY).glob(f"*-{path.name}"))
