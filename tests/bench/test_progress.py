import io

import pytest
from rich.console import Console

from resblock_bench.bench.progress import TaskProgress, counted


def test_a_terminal_sees_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with TaskProgress(Console(force_terminal=True, width=80), 2) as progress:
        progress.begin("the first")
        progress.finish("it took long")
    out = capsys.readouterr().out
    assert "1/2" in out and "the first" in out and "it took long" not in out


def test_without_a_terminal_each_task_is_a_line() -> None:
    file = io.StringIO()
    with TaskProgress(Console(file=file, width=20), 2) as progress:
        progress.begin("the first")
        progress.finish("the first: [it] took longer than a line is wide")
    text = file.getvalue()
    assert text.startswith("[1/2] the first: [it] took longer than a line is wide (")
    assert text.endswith(" left)\n")


def test_without_a_terminal_every_tenth_of_many_tasks_is_a_line() -> None:
    file = io.StringIO()
    with counted(Console(file=file), "compiling", 25) as advance:
        for _ in range(25):
            advance()
    first, *lines = file.getvalue().splitlines()
    assert first == "compiling: 25 tasks"
    done = [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert [line.partition(" (")[0] for line in lines] == [f"[{n}/25] compiling" for n in done]
