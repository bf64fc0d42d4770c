"""Markdown that shows text as it is."""

import html
import re
from collections.abc import Iterable, Sequence

from .terminal import visible


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    flat = " ".join(visible(text).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(flat, quote=False))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a table; its first `words` columns are words, the others numbers."""
    rule = "|" + ":--|" * words + "--:|" * (len(headings) - words)
    head, *body = (f"| {' | '.join(map(escaped, line))} |" for line in (headings, *rows))
    return [head, rule, *body]
