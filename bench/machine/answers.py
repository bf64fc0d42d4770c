"""Jobs carried out by as many workers as there are CPUs, with progress on a console."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing

from rich.console import Console

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.progress import counted

from . import workers
from .proc import usable_cpus
from .workers import Answer, Job, MachineFailed


def answers(
    jobs: Iterable[Job], console: Console, what: str, environ: Mapping[str, str] | None = None
) -> Generator[tuple[Job, Answer], None, None]:
    """What each job came to, equal ones once; `environ` as in Worker.

    Raises InvalidError where the operating system refused one: it would refuse them all.
    """
    wanted = list(dict.fromkeys(jobs))
    with (
        counted(console, what, len(wanted)) as advance,
        closing(workers.run(wanted, usable_cpus(), environ)) as found,
    ):
        for job, answer in found:
            if isinstance(answer.error, MachineFailed):
                raise InvalidError(
                    f"{what}: this machine cannot do it ({answer.error}): mend that first; of the "
                    "code nothing is known"
                )
            advance()
            yield job, answer
