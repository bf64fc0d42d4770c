"""Worker processes that the tests of a session share: a fresh one imports for seconds."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping

from resblock_bench.bench.machine.workers import JOB_LIMIT_S, Answer, Job, Worker, WorkerDied


class KeptWorkers:
    """One that compiles and one that interprets, each started when it is first asked, and anew
    where it has died."""

    def __init__(self) -> None:
        self._of: dict[bool, Worker] = {}

    def ask(self, job: Job) -> Answer:
        worker = self._of.get(job.interpret)
        if worker is None:
            worker = self._of[job.interpret] = Worker(interpret=job.interpret)
        worker.begin(job)
        if worker.connection.poll(JOB_LIMIT_S):
            answer = worker.answer()
        else:
            answer = Answer(None, WorkerDied(f"no answer after {JOB_LIMIT_S} s"))
        if isinstance(answer.error, WorkerDied):
            self._of.pop(job.interpret).kill()
        return answer

    def run(
        self, jobs: Iterable[Job], workers: int, environ: Mapping[str, str] | None = None
    ) -> Generator[tuple[Job, Answer], None, None]:
        """As `workers.run`, one after the other."""
        assert environ is None, "these have been started with the environment of the tests"
        for job in dict.fromkeys(jobs):
            yield job, self.ask(job)

    def end(self) -> None:
        for worker in self._of.values():
            worker.kill()
