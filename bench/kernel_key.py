"""Which launches compile to the same machine code: as Triton specialises, without compiling."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch

from resblock_bench.kernels.launch import Recorded


def compile_key(recorded: Recorded) -> Hashable:
    """Equal for launches of one kernel that Triton compiles once.

    Constants count by value, as do launch options; an int that is none by whether it is 1, a
    multiple of 16 and wider than 32 bits; a tensor by dtype and alignment. Finer than Triton where
    a parameter is not to be specialised, which costs a compilation and nothing else.
    """
    kernel = recorded.kernel
    constants = _constants(kernel)
    return kernel.__name__, tuple(
        (name, value if name in constants else _specialised(name, value))
        for name, value in sorted(recorded.arguments.items())
    )


@lru_cache(maxsize=64)
def _constants(kernel: Any) -> frozenset[str]:
    """Constexpr parameters, by annotation: a kernel may be interpreted here."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return frozenset(p.name for p in parameters if "constexpr" in str(p.annotation))


def _specialised(name: str, value: object) -> Hashable:
    if isinstance(value, torch.Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return str(value.dtype), aligned
    if (
        isinstance(value, bool)
        or name.startswith("num_")
        or name in ("maxnreg", "launch_cooperative_grid")
    ):
        return value
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    if isinstance(value, float):
        return "float"
    return str(value)
