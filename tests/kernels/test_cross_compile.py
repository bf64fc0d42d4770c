"""Every kernel compiles for the GPUs it is meant for, in both layouts, and reads 128 bits a time.

The interpreter accepts Python that the compiler does not, so passing there proves nothing here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "compile_kernels.py"
# What a kernel moves in bulk; the fold kernels read a few sums.
BULK = ("group_forward", "group_backward", "statistics_kernel", "apply", "sums_kernel", "input")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("arch", "dtype", "options"),
    [
        ("80", "bf16", "nothing"),
        ("90", "fp16", "everything"),
        ("90", "fp32", "nothing"),
        ("100", "bf16", "nothing"),
    ],
)
def test_compiles_with_wide_accesses(
    arch: str, dtype: str, options: str, layout: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch, layout, dtype, options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) == 10
    for name, cost in kernels.items():
        assert cost["shared_bytes"] <= 48 * 1024, name
        if name.startswith(BULK) and not name.startswith("fold"):
            assert cost["loads_128"] > 0, name
            if not name.startswith(("statistics", "sums")):
                assert cost["stores_128"] > 0, name
