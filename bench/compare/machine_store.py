"""What is kept of each machine: its calibration, in
results/baselines/<machine>/calibration-<device>-<threads>.json."""

from pathlib import Path

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.checkout import repository_root
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.records import Environment

_ADVICE = "free it, or run in another folder"


def calibration_file(environment: Environment, device: Kind, start: Path) -> Path:
    """The calibration of a machine's device, with as many threads, in the repository around
    `start`."""
    folder = repository_root(start) / "results" / "baselines" / environment.machine
    return folder / f"calibration-{device}-{environment.threads}.json"


def writable(path: Path) -> None:
    """Raises UsageError where `write` would."""
    with files.explained(path, _ADVICE):
        files.check_writable(path, parents=True)


def write(path: Path, content: msgspec.Struct) -> None:
    """Write a file whole or not at all. Raises UsageError where it cannot be written."""
    with files.explained(path, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as file:
            file.write(files.as_json(content))
