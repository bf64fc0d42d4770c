"""What a node of a Ray cluster does for a block: the same as one machine does for its own.

These functions run in a Ray worker, which itself never touches the device. JSON in, JSON out.
"""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.machine.gpu_lock import only_user
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.machine.scratch import scratch_folder
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.fingerprint import code_fingerprint
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.records import Environment

from .engines import Lane

_POLL_S = 0.2


class NodeJob(msgspec.Struct):
    """A block for a node. Its tasks are decoded once the node is known to have the same `code`."""

    code: str
    limit_s: float
    tasks: msgspec.Raw


def measure_on_node(argument: bytes) -> bytes:
    """NodeJob -> rows. Raises UsageError where this node cannot measure the block."""
    job = msgspec.json.decode(argument, type=NodeJob)
    if job.code != code_fingerprint():
        raise UsageError(
            f"the node {machine_name()} has other code ({code_fingerprint()}) than the run "
            f"({job.code}): install the same version of resblock-bench on every node"
        )
    tasks = msgspec.json.decode(job.tasks, type=list[Task])
    task = tasks[0]

    def measure(processes: Processes) -> bytes:
        # The ceilings of a run are measured once, by its own survey.
        survey = SurveyJob(task.device, task.environment.threads, ceilings=False)
        own = _survey(processes, survey)
        if _device(own, task.device) == _device(task.environment, task.device):
            own = replace(own, ceilings=task.environment.ceilings)
        # Without a shared file system the run's folder is not here.
        run_folder = task.folder if task.folder and Path(task.folder).is_dir() else None
        gpu = os.environ["CUDA_VISIBLE_DEVICES"] if task.device == "cuda" else None
        block = [replace(each, environment=own, folder=run_folder) for each in tasks]
        with contextlib.ExitStack() as stack:
            if own.gpu_uuid is not None and gpu is not None:
                stack.enter_context(only_user(own.gpu_uuid))
            folder = stack.enter_context(scratch_folder())
            lane = Lane(processes, folder, limit_s=job.limit_s, gpu=gpu)
            return msgspec.json.encode(lane.measure(block))

    return _with_processes(measure)


def survey_on_node(argument: bytes) -> bytes:
    """SurveyJob -> Environment. Raises UsageError where the device cannot be used."""
    job = msgspec.json.decode(argument, type=SurveyJob)
    return _with_processes(lambda processes: msgspec.json.encode(_survey(processes, job)))


def _survey(processes: Processes, job: SurveyJob) -> Environment:
    """This node; an error says which."""
    try:
        return survey(processes, job)
    except UsageError as error:
        raise UsageError(f"the node {machine_name()}: {error}") from None


def _device(found: Environment, kind: Kind) -> tuple[object, ...]:
    """What ceilings depend on: those measured on one machine hold for its likes only."""
    return (found.gpu,) if kind == "cuda" else (found.cpu, found.usable_cpus)


def _with_processes(work: Callable[[Processes], bytes]) -> bytes:
    """The result of `work`, whose processes end with it, also when Ray cancels the task.

    Ray cancels by a KeyboardInterrupt in the main thread, which would not be noticed there while
    it waits for a process.
    """
    processes = Processes()
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(work, processes)
        try:
            while not wait([result], timeout=_POLL_S).done:
                pass
        finally:
            processes.close()
        return result.result()
