"""Triton's interpreter without what it does again and again: half of its time."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import pytest


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter puts its own functions in the place of the language's before every call of a
    function of a kernel; within a launch they are there already."""
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
