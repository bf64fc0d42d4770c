"""What is kept of each machine: its calibration, and its baseline with the earlier ones.

results/baselines/<machine>/calibration-<device>-<threads>.json
                            timing.json
                            history/<when it was saved>-timing.json
"""

import re
from pathlib import Path

import msgspec

from resblock_bench.bench import files
from resblock_bench.bench.checkout import repository_root
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.records import Environment

TIMING = "timing.json"
_HISTORY = "history"
_ADVICE = "free it, or run in another folder"


def machine_folder(machine: str, start: Path) -> Path:
    """The folder of a machine in the repository around `start`."""
    return repository_root(start) / "results" / "baselines" / machine


def calibration_file(environment: Environment, device: Kind, start: Path) -> Path:
    """The calibration of a machine's device, with as many threads."""
    folder = machine_folder(environment.machine, start)
    return folder / f"calibration-{device}-{environment.threads}.json"


def writable(path: Path) -> None:
    """Raises UsageError where `write` would."""
    with files.explained(path, _ADVICE):
        files.check_writable(path, parents=True)


def write(path: Path, content: msgspec.Struct, *, keep: str | None = None) -> None:
    """Write a file whole or not at all.

    keep   the moment at which the present content was saved: it goes into the history under it

    Raises UsageError where it cannot be written.
    """
    with files.explained(path, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as file:
            file.write(files.as_json(content))
            if keep is not None:
                history = path.parent / _HISTORY
                history.mkdir(exist_ok=True)
                path.replace(history / f"{re.sub('[^0-9A-Za-z]', '', keep)}-{path.name}")


def history(path: Path) -> list[Path]:
    """The earlier versions of a file, oldest first."""
    return sorted((path.parent / _HISTORY).glob(f"*-{path.name}"))
