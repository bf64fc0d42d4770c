"""Which implementation and which launch a call takes: decided here and nowhere else.

A call runs in Triton on CUDA devices in fp32, fp16 and bf16, and in ATen everywhere else. Within
Triton the launch comes from the table that was measured on this architecture, or else from the
rules in `tiers.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from . import tuned
from .spec import memory_format
from .tiers import (
    Direction,
    Launch,
    Machine,
    Problem,
    Tier,
    plan_launch,
    rewrite_launch,
)

Backend = Literal["triton", "aten"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What stands in where there is no GPU to ask (interpreter, cross-compilation): an H100 SXM.
DEFAULT_MACHINE = Machine(sms=132, l2_bytes=50 * 2**20)

# Found out once, at import: torch.compile traces neither these look-ups nor a cache around them.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Plain globals, not ContextVars: torch.compile cannot trace reading the latter.
_preferred: Backend | None = None
_preferred_tier: Tier | None = None
_cpu_is_gpu = False

settings: tuple[Backend | None, Tier | None, bool] = (None, None, False)
"""These three: whatever decides on a call's launches beside the call and the measured table."""


@contextmanager
def prefer(backend: Backend, tier: Tier | None = None) -> Iterator[None]:
    """Within the block, all calls of the process take `backend`, or raise where it cannot run.

    "aten" measures or debugs without Triton. "triton" on CPU tensors runs the kernels in Triton's
    interpreter and needs TRITON_INTERPRET=1 in the environment before Python starts. `tier` "A" to
    "D" overrides Triton's choice; a call that the tier cannot hold raises ValueError.
    """
    if backend not in ("triton", "aten"):
        raise ValueError(f"backend is 'triton' or 'aten', not {backend!r}.")
    if tier not in (None, "A", "B", "C", "D"):
        raise ValueError(f"tier is 'A', 'B', 'C', 'D' or None, not {tier!r}.")
    with _set(backend, tier, _cpu_is_gpu):
        yield


@contextmanager
def standing_for_gpu() -> Iterator[None]:
    """Within the block tensors on the CPU count as a GPU's, and kernels are launched on them.

    For a Triton driver that launches nothing, which measures the host's part of a call.
    """
    if interpreting():
        raise RuntimeError("kernels are interpreted here: set TRITON_INTERPRET=0 beforehand.")
    with _set(_preferred, _preferred_tier, True):
        yield


@contextmanager
def _set(backend: Backend | None, tier: Tier | None, cpu_is_gpu: bool) -> Iterator[None]:
    global _preferred, _preferred_tier, _cpu_is_gpu, settings
    before = settings
    _preferred, _preferred_tier, _cpu_is_gpu = settings = (backend, tier, cpu_is_gpu)
    try:
        yield
    finally:
        _preferred, _preferred_tier, _cpu_is_gpu = settings = before


def choose_backend(x: Tensor) -> tuple[Backend, str]:
    """Triton or ATen, and why."""
    obstacle = triton_obstacle(x)
    if _preferred == "aten":
        return "aten", "asked for with prefer('aten')"
    if x.numel() == 0:
        return "aten", "x is empty"
    if _preferred == "triton":
        if obstacle is not None:
            raise RuntimeError(f"prefer('triton') was asked for, but {obstacle}.")
        return "triton", "asked for with prefer('triton')"
    if x.device.type == "cpu" and not _cpu_is_gpu:
        return "aten", "x is on the CPU, where Triton only interprets"
    if obstacle is not None:
        return "aten", obstacle
    return "triton", f"{x.device.type} tensor in {str(x.dtype).removeprefix('torch.')}"


def triton_obstacle(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take x, or None."""
    if not triton_installed():
        return "Triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"the Triton kernels compute in fp32, and x is {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cpu" and not interpreting() and not _cpu_is_gpu:
        return "x is on the CPU and TRITON_INTERPRET=1 is not set"
    if x.device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA devices, and x is on {x.device.type}"
    return None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """Whether kernels are interpreted: Triton reads the variable when it defines them."""
    return _INTERPRETING


def launch_for(direction: Direction, x: Tensor, num_groups: int) -> Launch:
    """The launch of a call on x, whose arguments are valid."""
    problem, (machine, arch) = problem_of(x, num_groups), _machine(x.device)
    if _preferred_tier is not None:
        return plan_launch(direction, problem, machine, _preferred_tier)
    return tuned.launch_for(direction, problem, machine, arch) or plan_launch(
        direction, problem, machine
    )


def rewrite_launch_for(x: Tensor, num_groups: int) -> Launch:
    """The launch that writes the output of a call on x once more."""
    return rewrite_launch(problem_of(x, num_groups), _machine(x.device)[0])


def problem_of(x: Tensor, num_groups: int) -> Problem:
    N, C = x.shape[:2]
    channels_last = memory_format(x) != torch.contiguous_format
    return Problem(N, C, x.numel() // (N * C), num_groups, channels_last, x.element_size())


@functools.cache
def _machine(device: torch.device) -> tuple[Machine, str | None]:
    """What `tiers.py` asks of a GPU, and the name of its architecture."""
    if device.type != "cuda":
        return DEFAULT_MACHINE, None
    properties = torch.cuda.get_device_properties(device)
    machine = Machine(properties.multi_processor_count, properties.L2_cache_size)
    return machine, f"sm_{properties.major}{properties.minor}"
