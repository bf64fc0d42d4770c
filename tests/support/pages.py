"""A page as a tree: what a browser makes of it, and strict about what is not closed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = ("meta", "input", "br", "hr", "link", "img")


@dataclass
class Tag:
    """An element; `parts` are texts and elements in their order."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    parts: list[str | Tag] = field(default_factory=list)

    def all(self, *names: str) -> list[Tag]:
        """Those within it of some names, or of any, in the order of the page."""
        return [tag for tag in self._within() if not names or tag.name in names]

    def _within(self) -> Iterator[Tag]:
        for part in self.parts:
            if isinstance(part, Tag):
                yield part
                yield from part._within()

    def text(self) -> str:
        texts = (part if isinstance(part, str) else part.text() for part in self.parts)
        return " ".join("".join(texts).split())

    def get(self, name: str) -> str:
        return self.attributes.get(name, "")


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Tag("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        found = Tag(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(found)
        if tag not in _VOID:
            self.open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def parsed(html: str) -> Tag:
    """The root, which holds the page. Raises AssertionError where tags don't nest."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert len(parser.open) == 1, f"not closed: {[tag.name for tag in parser.open[1:]]}"
    return parser.open[0]
