"""Asks a process of its own about the machine: who waits for cells never touches the device."""

from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.records import Environment

from . import jobs

_LIMIT_S = 300.0  # A driver that hangs must not hold a run for ever.


def survey(
    processes: Processes, job: jobs.SurveyJob, variables: Mapping[str, str] | None = None
) -> Environment:
    """This machine; `variables` decide which GPU is looked at.

    Raises UsageError where the device cannot be used.
    """
    ending = processes.run(
        jobs.survey, msgspec.json.encode(job), limit_s=_LIMIT_S, environment=variables
    )
    if ending.reply is None:
        _, problem = ending.problem(_LIMIT_S)
        raise UsageError(
            f"the device {job.device!r} cannot be used: {problem}; try 'resblock-bench env'"
        )
    reply = msgspec.json.decode(ending.reply, type=jobs.Survey)
    if reply.environment is None:
        raise UsageError(str(reply.refusal))
    return replace(reply.environment, machine=machine_name())
