"""What is kept of each machine: its calibration, and its baseline with the earlier ones.

results/baselines/<machine>/calibration.json
                            timing.json
                            history/<when it was saved>-timing.json
"""

import re
from pathlib import Path

import msgspec

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.storage import repository_root

CALIBRATION = "calibration.json"
TIMING = "timing.json"
_HISTORY = "history"


def machine_folder(machine: str, start: Path) -> Path:
    """The folder of a machine in the repository around `start`."""
    return repository_root(start) / "results" / "baselines" / machine


def write(path: Path, content: msgspec.Struct, *, keep: str | None = None) -> None:
    """Write a file whole or not at all.

    keep   the moment at which the present content was saved: it goes into the history under it

    Raises UsageError where it cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(data)
        if keep is not None:
            history = path.parent / _HISTORY
            history.mkdir(exist_ok=True)
            path.replace(history / f"{re.sub('[^0-9A-Za-z]', '', keep)}-{path.name}")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): free it, or run in another folder"
        ) from None


def history(path: Path) -> list[Path]:
    """The earlier versions of a file, oldest first."""
    return sorted((path.parent / _HISTORY).glob(f"*-{path.name}"))
