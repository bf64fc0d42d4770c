"""Keeps the float64 truths of a site in files, for the processes of its variants: that of the first
inputs, and of the last.

Arrays in NumPy's own format and a JSON head; reading executes nothing.
"""

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import torch

from resblock_bench.bench import files
from resblock_bench.bench.records import Cell, site_of

from .correctness import Truth
from .workload import checked_cell

FIRST, LAST = "first.npz", "last.npz"
_HEAD = "head"


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str]
    scales: dict[str, float]
    limits: dict[str, float]


def truths_folder(folder: Path, cell: Cell, seed: int) -> Path:
    """Where in `folder` the truths of a cell's site lie: the same for all its variants."""
    site = checked_cell(site_of(cell))
    content = msgspec.json.encode([site, seed], order="deterministic")
    return folder / hashlib.sha256(content).hexdigest()[:16]


def write_truth(path: Path, truth: Truth) -> None:
    """Write it whole or not at all."""
    head = _Head(list(truth.tensors), truth.scales, truth.limits)
    arrays = {f"t{i}": tensor.numpy() for i, tensor in enumerate(truth.tensors.values())}
    arrays[_HEAD] = np.frombuffer(msgspec.json.encode(head), dtype=np.uint8)
    with files.whole(path, durable=False) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_truth(path: Path) -> Truth:
    """The truth that `write_truth` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        head = msgspec.json.decode(arrays[_HEAD].tobytes(), type=_Head)
        tensors = {name: torch.from_numpy(arrays[f"t{i}"]) for i, name in enumerate(head.names)}
    return Truth(tensors, head.scales, head.limits)
