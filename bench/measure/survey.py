"""Asks a process of its own about the machine: who waits for cells never touches the device."""

from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine import environment
from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.records import Environment

from .ceilings import measure_ceilings
from .devices import Kind, open_device

_LIMIT_S = 300.0  # A driver that hangs must not hold a run for ever.


class SurveyJob(msgspec.Struct):
    """Find out about the machine, and measure its ceilings where they are wanted."""

    device: Kind
    threads: int
    ceilings: bool = True


class _Reply(msgspec.Struct):
    """The machine, or the sentence that says why the device cannot be used."""

    environment: Environment | None = None
    refusal: str | None = None


def survey(
    processes: Processes, job: SurveyJob, variables: Mapping[str, str] | None = None
) -> Environment:
    """This machine; `variables` decide which GPU is looked at.

    Raises UsageError where the device cannot be used.
    """
    ending = processes.run(_look, msgspec.json.encode(job), limit_s=_LIMIT_S, environment=variables)
    if ending.reply is None:
        _, problem = ending.problem(_LIMIT_S)
        raise UsageError(
            f"the device {job.device!r} cannot be used: {problem}; try 'resblock-bench env'"
        )
    reply = msgspec.json.decode(ending.reply, type=_Reply)
    if reply.environment is None:
        raise UsageError(str(reply.refusal))
    return replace(reply.environment, machine=environment.machine_name())


def _look(argument: bytes, channel: Channel) -> bytes:
    """SurveyJob -> _Reply."""
    channel.announce("survey")
    job = msgspec.json.decode(argument, type=SurveyJob)
    try:
        device = open_device(job.device, job.threads)
    except UsageError as error:
        return msgspec.json.encode(_Reply(refusal=str(error)))
    found = environment.gather(job.threads)
    if job.ceilings:
        found = replace(found, ceilings=measure_ceilings(device))
    return msgspec.json.encode(_Reply(found))
