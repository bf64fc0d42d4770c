"""What is kept of each machine: its calibration, in
results/baselines/<machine>/calibration-<device>-<threads>.json."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.records import Environment
from resblock_bench.bench.runs.folder import repository_root

_ROOM = 1 << 16  # bytes; more than is ever kept of a gate's cells


def calibration_file(environment: Environment, device: Kind, start: Path) -> Path:
    """The calibration of a machine's device, with as many threads, in the repository around
    `start`."""
    folder = repository_root(start) / "results" / "baselines" / environment.machine
    return folder / f"calibration-{device}-{environment.threads}.json"


def writable(path: Path) -> None:
    """Raises UsageError where `write` would: what takes minutes to measure is not to be lost."""
    with _explained(path):
        _temporary(path).write_bytes(b" " * _ROOM)
        _temporary(path).unlink()


def write(path: Path, content: msgspec.Struct) -> None:
    """Write a file whole or not at all. Raises UsageError where it cannot be written."""
    data = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
    with _explained(path):
        _temporary(path).write_bytes(data)
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
