"""Everything but the Triton path works where Triton is not installed (macOS, Windows)."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)

import torch
from resblock_bench import kernels, reference
import resblock_bench.bench.cli.main

block = kernels.ResBlock(32, 8, 0.1, use_scale_shift_norm=True, checkpoint="selective")
block(torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 8)).sum().backward()
print(kernels.fuse_(reference.ResBlock(32, 8, 0.0)))
print(kernels.explain(torch.empty(2, 32, 4, 4, device="meta"), 32))
try:
    with kernels.prefer("triton"):
        kernels.group_norm_silu(torch.randn(1, 4, 4), 2)
except RuntimeError as error:
    print(error)
assert "triton" not in sys.modules
"""


@pytest.mark.slow
def test_everything_but_the_triton_path() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(model): ResBlock" in done.stdout
    assert "aten: Triton is not installed" in done.stdout
    assert ", no Triton" in done.stdout
    assert "prefer('triton') was asked for, but Triton is not installed." in done.stdout
