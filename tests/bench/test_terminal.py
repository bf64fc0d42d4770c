"""Text that others wrote cannot steer a terminal, break a table, or pass for another command."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from resblock_bench.bench.markdown import escaped
from resblock_bench.bench.terminal import SafeConsole, say, visible

EVIL = "\x1b]0;title\x07\x1b[31mred\x9b0m \u202egnp.exe\ud800\u2028机器 é \U0001f642"
SEEN = "]0;title[31mred0m gnp.exe\ufffd机器 é \U0001f642"


def test_what_is_shown_steers_nothing() -> None:
    assert visible(EVIL) == SEEN
    assert visible("a\tb\nc") == "a\tb\nc"


@pytest.mark.parametrize("code", [*range(32), *range(0x7F, 0xA0), 0x200E, 0x2029, 0x2066, 0xDFFF])
def test_no_control_character_is_shown(code: int) -> None:
    assert visible(chr(code)) in ("", "\t", "\n", "\ufffd")


def test_a_console_shows_it_so_wherever_it_stands() -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, width=100)
    table = Table("name", "more" * 10, title=Text(EVIL))
    table.add_row(Text(EVIL.replace("\u2028", "")), "")
    console.print(table)
    say(console, EVIL)
    text = file.getvalue()
    assert text.count(SEEN) == 3
    assert not set(text) & set("\x1b\x07\x9b\u202e\u2028\ud800")
    # What is taken out had no width, so the table's edges are still below one another.
    assert len({line.rstrip()[-1] for line in text.splitlines()[1:6]} & set("┓┃┩│┘")) == 5


def test_a_console_still_has_its_own_colours() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print("[red]x[/red]")
    assert "\x1b[31mx\x1b[0m" in file.getvalue()


def test_markdown_shows_it_so() -> None:
    assert escaped(EVIL) == SEEN.replace("[", "\\[").replace("]", "\\]")
