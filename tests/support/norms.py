"""A norm of a block, as the cost of kernels is asked for."""

from __future__ import annotations

from typing import Any

from resblock_bench.bench.compiled.norms import Norm


def norm(**changes: Any) -> Norm:
    fields: dict[str, Any] = {
        "batch": 8,
        "channels": 256,
        "positions": 1024,
        "groups": 32,
        "dtype": "bf16",
        "layout": "nchw",
        "modulation": "scale_shift",
        "bias_folded": True,
        "dropout": 0.0,
    }
    return Norm(**fields | changes)
