"""Matplotlib's figures as parts of a page: small, in its colours, with ids that are their own.

A colour becomes a custom property, whose value on a dark page has its lightness mirrored. A style
becomes a class, so that the page can forbid every style that is not its own. Text stays text: it
takes a third of the bytes that outlines do, and is found by a search.
"""

import colorsys
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"(?<=url\(#)[^)]+|(?<=^#).+")
_NUMBERS = ("d", "x", "y", "transform", "width", "height", "points")
_SPACED = ("text", "tspan")
"""Elements whose white space is text."""
_PIXELS = 4 / 3  # of a point


class Figures:
    """The figures of one page, and the style sheet that they share."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}
        self._colours: set[str] = set()
        self._count = 0

    def inline(self, figure: Figure, label: str) -> Markup:
        """An svg element; `label` is what stands for it where it is not seen."""
        buffer = io.StringIO()
        with plt.rc_context({"svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        source = ElementTree.fromstring(buffer.getvalue())
        self._count += 1
        names: dict[str, str] = {}
        for value in (value for one in source.iter() for value in one.attrib.values()):
            for name in _REFERENCE.findall(value):
                names.setdefault(name, f"f{self._count}-{len(names)}")
        svg = Element("svg", {"role": "img", "aria-label": label})
        svg.set("viewBox", source.attrib["viewBox"])
        svg.set("width", f"{figure.get_figwidth() * 72 * _PIXELS:.0f}")
        svg.extend(self._children(source, names))
        return Markup(ElementTree.tostring(svg, encoding="unicode"))

    def css(self) -> str:
        """The classes, and the colours on a light page and a dark one."""
        light = "".join(f"--c{colour[1:]}:{colour};" for colour in sorted(self._colours))
        dark = "".join(f"--c{colour[1:]}:{mirrored(colour)};" for colour in sorted(self._colours))
        rules = [f".{name}{{{style}}}" for style, name in self._classes.items()]
        return "\n".join(
            [
                f":root{{{light}}}",
                f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}",
                *rules,
            ]
        )

    def _children(self, element: Element, names: dict[str, str]) -> Iterator[Element]:
        for child in element:
            yield from self._reduced(child, names)

    def _reduced(self, element: Element, names: dict[str, str]) -> list[Element]:
        """The element without what says nothing; of a group that says nothing, what is in it."""
        tag = element.tag.rpartition("}")[2]
        if tag in ("metadata", "style"):
            return []
        found = Element(tag, self._attributes(element, names))
        found.extend(self._children(element, names))
        if tag in _SPACED:
            found.text = element.text
            for own, given in zip(found, element, strict=True):
                own.tail = given.tail
        if tag in ("g", "defs") and not len(found):
            return []
        return list(found) if tag == "g" and not found.attrib else [found]

    def _attributes(self, element: Element, names: dict[str, str]) -> dict[str, str]:
        found = {}
        for key, value in element.attrib.items():
            name = key.rpartition("}")[2]
            if name == "style":
                found["class"] = self._class_of(value)
            elif name == "id":
                if value in names:
                    found["id"] = names[value]
            elif name in _NUMBERS:
                found[name] = _short(value)
            else:
                found[name] = _REFERENCE.sub(lambda match: names[match[0]], value)
        return found

    def _class_of(self, style: str) -> str:
        self._colours.update(_COLOUR.findall(style))
        style = _COLOUR.sub(lambda match: f"var(--c{match[0][1:]})", style)
        return self._classes.setdefault(style, f"s{len(self._classes)}")


def mirrored(colour: str) -> str:
    """A colour for a dark page: a grey as light on it as it was dark on a light one, and any other
    of the same hue, no darker than it was."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    opposite = 0.92 - 0.85 * lightness
    return to_hex(
        colorsys.hls_to_rgb(hue, max(lightness, opposite) if saturation else opposite, saturation)
    )


def _short(numbers: str) -> str:
    """Coordinates to a hundredth of a point."""
    text = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return re.sub(r" ?([A-Za-z]) ?", r"\1", " ".join(text.split()))
