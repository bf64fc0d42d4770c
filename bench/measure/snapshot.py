"""What the GPU's memory held when a cell ran out of it, for PyTorch's memory viewer.

The allocator's history has to be on record beforehand, and is forgotten once recording ends, so the
snapshot is written while the exception passes. Recording costs time at every allocation: never
while a step is timed. On a CPU PyTorch has no such record; nothing is done and no file written.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch

from resblock_bench.bench import files

MAX_ENTRIES = 10_000
"""Allocations and frees kept, the latest; with their Python stacks about a kilobyte each."""


@contextlib.contextmanager
def recording(device: torch.device, path: Path | None) -> Iterator[None]:
    """Keep the allocator's history; where the memory of a GPU runs out, `dump` it to `path`.

    Nothing is done on a CPU, nor without a path.
    """
    if device.type != "cuda" or path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError:
        dump(path)
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def dump(path: Path) -> Path | None:
    """Write the allocator's state and history, whole or not at all; None where that failed.

    It never raises: it runs where something else has failed already.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        files.make_folder(path.parent)
        torch.cuda.memory._dump_snapshot(str(part))  # type: ignore[no-untyped-call]
        os.replace(part, path)
    except Exception:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return None
    return path
