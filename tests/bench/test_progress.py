import io

from rich.console import Console

from resblock_bench.bench.sweep.progress import task_progress


def test_without_a_terminal_every_tenth_of_the_work_is_a_line() -> None:
    console = Console(file=io.StringIO())
    with task_progress(console, "compiling", 25) as advance:
        for _ in range(25):
            advance()
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "compiling: 25 tasks"
    assert [int(line.split()[1]) for line in lines[1:]] == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
