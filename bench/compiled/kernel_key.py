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
    multiple of 16 and wider than 32 bits, or by the last alone where it is not to be specialised; a
    tensor by dtype and alignment.
    """
    kernel = recorded.kernel
    constants, kept = _constants(kernel), _unspecialised(kernel)

    def key(name: str, value: object) -> Hashable:
        if name not in kernel.arg_names or name in constants:
            return str(value)
        return _specialised(value, name in kept)

    arguments = sorted(recorded.arguments.items())
    return kernel.__name__, tuple((name, key(name, value)) for name, value in arguments)


@lru_cache(maxsize=64)
def _constants(kernel: Any) -> frozenset[str]:
    """Constexpr parameters, by annotation: a kernel may be interpreted here."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return frozenset(p.name for p in parameters if "constexpr" in str(p.annotation))


@lru_cache(maxsize=64)
def _unspecialised(kernel: Any) -> frozenset[str]:
    """Parameters that keep their type alone; none is known of an interpreted kernel."""
    parameters = getattr(kernel, "params", ())
    return frozenset(p.name for p in parameters if p.do_not_specialize)


def _specialised(value: object, kept: bool) -> Hashable:
    if isinstance(value, torch.Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return str(value.dtype), aligned or kept
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        narrow = -(2**31) <= value < 2**31
        return narrow if kept else (value == 1, value % 16 == 0, narrow)
    if isinstance(value, float):
        return "float"
    return str(value)
