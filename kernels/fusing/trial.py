"""Whether a class that nobody here wrote computes what its structure says.

A name and a structure are no proof. So a tiny instance is made without its constructor, given small
layers, and run once for a class: what differs from the formula is not fused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .family import set_by_fusing

C = TypeVar("C", bound=Callable[..., "str | None"])


@contextmanager
def aside() -> Iterator[None]:
    """On the CPU, whatever device, mode or precision is set; the caller's random state is kept."""
    usual = torch.get_default_dtype()
    with (
        unset_fake_temporarily(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.no_grad(),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed is every device's
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def trial(run: C) -> C:
    """Decorates a function of a class that says what is wrong with it: run once a class, aside."""

    @functools.cache  # of what was tried to the end: what raised may not do so another time
    def once(*arguments: Any) -> str | None:
        with aside():
            return run(*arguments)

    def tried(cls: Any, *arguments: Any) -> str | None:
        try:
            return once(cls, *arguments)
        except Exception as error:  # whatever code that nobody here wrote raises
            return f"{cls.__name__} cannot be tried: {type(error).__name__}: {error}"

    return tried  # type: ignore[return-value]


def bare(cls: type[nn.Module], **attributes: Any) -> Any:
    """An instance of the class without its constructor."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def randomised(module: nn.Module) -> Any:
    """In float64."""
    module.double()
    for p in module.parameters():
        p.copy_(torch.randn_like(p))
    return module


def public_attributes(module: nn.Module) -> set[str]:
    """The names of what is set on the module itself, and neither on every one nor by fusing."""
    public = {name for name in vars(module) if not name.startswith("_")}
    return public - {"training"} - set_by_fusing(module)


@trial
def silu_trial(cls: type[nn.Module]) -> str | None:
    x = torch.linspace(-9, 9, 19)
    if torch.allclose(bare(cls)(x), F.silu(x), rtol=1e-5, atol=1e-6):
        return None
    return f"{cls.__name__} is no SiLU"


@trial
def norm_trial(cls: type[nn.Module]) -> str | None:
    if issubclass(cls, nn.GroupNorm):
        norm = bare(cls)
        nn.GroupNorm.__init__(norm, 2, 6, eps=0.1)
    else:
        norm = bare(cls, num_groups=2, eps=0.1)
        norm.weight, norm.bias = nn.Parameter(torch.empty(6)), nn.Parameter(torch.empty(6))
    for p in norm.parameters():
        p.copy_(torch.randn_like(p))
    x = torch.randn(2, 6, 4, 4)
    expected = F.group_norm(x, 2, norm.weight, norm.bias, 0.1)
    if not torch.allclose(norm(x), expected, rtol=1e-4, atol=1e-5):
        return f"{cls.__name__} computes another norm"
    low = norm(x.bfloat16())
    if low.dtype != torch.bfloat16 or not torch.allclose(low.float(), expected, atol=0.2):
        return f"{cls.__name__} computes another norm of 16-bit numbers"
    return None


def agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= 1e-5 * expected.norm())
