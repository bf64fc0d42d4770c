"""The profiles that lie in a run's folder, as parts of its page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import msgspec
from markupsafe import Markup
from msgspec.structs import replace

from resblock_bench.bench.errors import shortened
from resblock_bench.bench.profile.figures import drawn
from resblock_bench.bench.profile.profiles import PROFILES, Profile, read_profiles
from resblock_bench.bench.profile.shown import (
    GROUP_HEADINGS,
    MODULE_HEADINGS,
    attributed_words,
    group_lines,
    memory_words,
    module_lines,
    notes_of,
    step_words,
)
from resblock_bench.bench.records import cell_name
from resblock_bench.bench.runs.folder import Run
from resblock_bench.bench.runs.style import styled
from resblock_bench.bench.units import counted

from .content import DataTable, Entry, Heading, shown_texts
from .inline import Figures

MOST_PROFILES = 4
_TITLES = {
    "memory": "What is alive over the step, by what it is for",
    "roofline": "Operations a second over operations a byte, below what the machine can do",
}


@dataclass(frozen=True)
class ShownProfile:
    """A profile, as the page says it."""

    title: str
    sentences: Sequence[str]
    groups: DataTable
    modules: DataTable
    figures: Sequence[tuple[str, Markup]]


def profiles_of(run: Run, figures: Figures) -> tuple[list[ShownProfile], str | None]:
    """What there is to show, and a sentence where there are more. Raises InvalidError for a profile
    that is damaged."""
    found = read_profiles(run.folder)
    more = len(found) - MOST_PROFILES
    note = f"{counted(more, 'more profile')} in {PROFILES}/ of the folder." if more > 0 else None
    return [_shown(one, figures) for one in found[:MOST_PROFILES]], note


def _shown(found: Profile, figures: Figures) -> ShownProfile:
    found = msgspec.convert(shown_texts(msgspec.to_builtins(found)), Profile)
    cell = replace(found.cell, impl=shortened(found.cell.impl))
    found = replace(found, cell=cell)
    sentences = [f"{step_words(found)}.", f"{attributed_words(found)}."]
    if found.memory is not None:
        sentences.append(f"{memory_words(found)}.")
    pictures = []
    with styled():
        for name, figure in drawn(found):
            label = f"{_TITLES[name]}: {cell_name(cell)}. The numbers are in the tables."
            pictures.append((_TITLES[name], figures.inline(figure, label)))
            plt.close(figure)
    return ShownProfile(
        title=f"{cell_name(cell)}, {found.id}",
        sentences=sentences + list(notes_of(found)),
        groups=_table(GROUP_HEADINGS, group_lines(found)),
        modules=_table(MODULE_HEADINGS, module_lines(found)),
        figures=pictures,
    )


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> DataTable:
    rows = [[Entry(text) for text in line] for line in lines]
    return DataTable([Heading(text) for text in headings], rows)
