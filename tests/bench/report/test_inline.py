"""Figures within a page."""

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from resblock_bench.bench.report import inline
from resblock_bench.bench.report.inline import Figures, mirrored
from resblock_bench.bench.runs.style import COLOURS, GREY, OTHER_COLOURS

CSS = Path(inline.__file__).with_name("page.css")


def drawn() -> Figure:
    figure, ax = plt.subplots()
    ax.plot([1, 2, 3], [1, 2, 1], "o", color="#d55e00")
    ax.axhline(1.5, color="#000000")
    ax.text(1, 1, "a  <b> & c")
    return figure


@pytest.fixture
def pair() -> tuple[list[str], str]:
    """The same figure twice on a page, and its style sheet."""
    figures = Figures()
    texts = [str(figures.inline(drawn(), 'what "it" shows')) for _ in range(2)]
    plt.close("all")
    return texts, figures.css()


def test_ids_of_two_figures_differ(pair: tuple[list[str], str]) -> None:
    ids = [re.findall(r' id="([^"]+)"', text) for text in pair[0]]
    assert ids[0]
    assert not {*ids[0]} & {*ids[1]}
    for own, text in zip(ids, pair[0], strict=True):
        assert {*re.findall(r'#([\w-]+)[")]', text)} == {*own}, "what is not referred to has none"


def test_styles_are_classes_of_the_page(pair: tuple[list[str], str]) -> None:
    (text, again), css = pair
    assert "style" not in text
    classes = {*re.findall(r' class="([^"]+)"', text)}
    assert classes == {*re.findall(r' class="([^"]+)"', again)}
    assert classes <= {*re.findall(r"^\.(\w+)\{", css, re.M)}


def test_text_stays_text(pair: tuple[list[str], str]) -> None:
    root = ElementTree.fromstring(pair[0][0])
    assert root.get("aria-label") == 'what "it" shows'
    assert "a  <b> & c" in [text.text for text in root.iter("text")]


def test_a_figure_is_less_than_half_of_matplotlib_s(pair: tuple[list[str], str]) -> None:
    from io import StringIO

    buffer = StringIO()
    drawn().savefig(buffer, format="svg")
    plt.close("all")
    assert len(pair[0][0]) < len(buffer.getvalue()) / 2


def test_every_colour_has_one_on_a_dark_page(pair: tuple[list[str], str]) -> None:
    light, dark = pair[1].splitlines()[:2]
    used = {*re.findall(r"var\(--c(\w{6})\)", pair[1])}
    assert "d55e00" in used
    for line in (light, dark):
        assert {*re.findall(r"--c(\w{6}):", line)} == used
    assert dark.startswith("@media screen and (prefers-color-scheme:dark)")


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [*COLOURS.values(), *OTHER_COLOURS, GREY, "#440154"])
def test_marks_are_seen_on_a_dark_page(colour: str) -> None:
    assert contrast(mirrored(colour), mirrored("#ffffff")) >= 3


def palette(dark: bool) -> dict[str, str]:
    """The page's own colours, by name."""
    blocks = re.findall(r":root \{(.*?)\}", CSS.read_text(encoding="utf-8"), re.S)
    found = re.findall(r"--(\w+): (#\w+);", blocks[dark])
    return {
        name: value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:])
        for name, value in found
    }


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_read_on_every_background(dark: bool) -> None:
    """4.5 is what the guidelines ask of text of this size."""
    colours = palette(dark)
    for name in ("ink", "faint", "good", "note", "bad", "link"):
        for background in ("paper", "band"):
            assert contrast(colours[name], colours[background]) >= 4.5, name
