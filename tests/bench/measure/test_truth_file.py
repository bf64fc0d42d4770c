from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from resblock_bench.bench.measure.correctness import compute_truth
from resblock_bench.bench.measure.truth_file import read_truth, truths_folder, write_truth
from resblock_bench.bench.records import Cell

MakeCell = Callable[..., Cell]


def test_all_variants_of_a_site_share_their_truths(make_cell: MakeCell, tmp_path: Path) -> None:
    paths = {
        truths_folder(tmp_path, make_cell(impl=impl, checkpoint=checkpoint, dropout=dropout), 0)
        for impl, checkpoint, dropout in (
            ("reference", "none", 0.0), ("fused", "full", 0.0), ("fused", "none", 0.1),
        )
    }  # fmt: skip
    assert len(paths) == 1
    assert truths_folder(tmp_path, make_cell(batch=3), 0) not in paths
    assert truths_folder(tmp_path, make_cell(), 1) not in paths


def test_a_truth_is_read_back_to_the_bit(make_cell: MakeCell, tmp_path: Path) -> None:
    truth = compute_truth(make_cell(), torch.device("cpu"), 0, 0)
    path = tmp_path / "truth.npz"
    write_truth(path, truth)
    back = read_truth(path)
    assert (back.scales, back.limits) == (truth.scales, truth.limits)
    assert back.tensors.keys() == truth.tensors.keys()
    for name, tensor in truth.tensors.items():
        assert back.tensors[name].dtype == torch.float64
        assert torch.equal(back.tensors[name], tensor)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_half_written_is_left(
    make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, **arrays: object) -> None:
        raise OSError("No space left on device")

    truth = compute_truth(make_cell(mode="inference"), torch.device("cpu"), 0, 0)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        write_truth(tmp_path / "truth.npz", truth)
    assert list(tmp_path.iterdir()) == []
