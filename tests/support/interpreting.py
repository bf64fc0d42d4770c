"""Triton's interpreter without what it does again and again: more than half of its time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def do_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same for a whole launch, or for a type.

    The interpreter puts its own functions in the place of the language's before every call of a
    function of a kernel; within a launch they are there already.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn: Any) -> list[Any]:
        known = (language, language.core)
        return [v for v in fn.__globals__.values() if inspect.ismodule(v) and v in known]

    def patch_once(fn: Any) -> Any:
        if any(language.core.is_builtin(one.load) for one in languages(fn)):
            return patch(fn)
        return SimpleNamespace(restore=lambda: None)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", _known(interpreter._get_np_dtype))
    monkeypatch.setattr(language.core.tensor, "__init__", _alike(language.core.tensor.__init__))


def _known(of_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's dtype of a type of the language, which is looked for among all at every operation."""
    dtypes: dict[str, Any] = {}

    def known(type_: Any) -> Any:
        if type_.name not in dtypes:
            dtypes[type_.name] = of_type(type_)
        return dtypes[type_.name]

    return known


def _alike(initialize: Callable[..., None]) -> Callable[..., None]:
    """What follows from a tensor's type is the same for all that have it."""
    follows: dict[str, dict[str, Any]] = {}

    def alike(self: Any, handle: Any, type: Any) -> None:
        if type.name not in follows:
            initialize(self, handle, type)
            follows[type.name] = vars(self).copy()
        vars(self).update(follows[type.name], handle=handle, type=type, dtype=type.scalar)

    return alike
