"""Measures on the nodes of a Ray cluster: a block is a Ray task, and its rows are the reply.

What happens on a node is what happens on one machine (ray_node.py). Ray only finds the node, keeps
other tasks off its GPU or cores, and says when it is lost.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError, first_line, unknown
from resblock_bench.bench.machine.environment import machine_name
from resblock_bench.bench.machine.process import ProcessesClosed
from resblock_bench.bench.measure.cell import row_of
from resblock_bench.bench.measure.devices import Kind
from resblock_bench.bench.measure.fingerprint import code_fingerprint
from resblock_bench.bench.measure.survey import SurveyJob
from resblock_bench.bench.records import Environment, Row, Status

from .engines import Block
from .ray_node import NodeJob, measure_on_node, survey_on_node

_MOST_BLOCKS = 512  # Each waits in a thread of this process.
_ANSWER_S = 10.0  # So long a cluster may take to be connected to.
_CANCEL_S = 10.0  # After that, Ray kills what has not ended by itself.
_ACCELERATOR = "accelerator_type:"
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Of all that Ray prints here of other processes, nothing: rows say what became of them.
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
}
"""Variables that Ray reads when it is imported."""


class RayEngine:
    """The nodes of a running Ray cluster, each task with a GPU or cores of its own.

    kind          "cuda" takes a GPU for each block, "cpu" takes `threads` cores
    threads       of a cell
    limit_s       the time limit of a cell, seconds; waiting for a node does not count
    address       of the cluster; "auto" is the one that this machine belongs to
    accelerator   Ray's name of the type of GPU to measure on, such as "H100"; None where the
                  cluster has one type only

    Raises UsageError where Ray is not installed, no cluster answers, or none of its nodes can take
    a cell.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        threads: int,
        limit_s: float,
        address: str = "auto",
        accelerator: str | None = None,
    ) -> None:
        self._ray = ray = _import_ray()
        self._kind, self._threads, self._limit_s = kind, threads, limit_s
        self._running: set[Any] = set()
        self._lock = threading.Lock()
        self._closed = False
        _connect(ray, address)
        try:
            self._accelerator = choose_accelerator(ray.nodes(), kind, accelerator)
            self._options = _options(kind, threads, self._accelerator)
            if self._room() < 1:
                wanted = "a GPU" if kind == "cuda" else f"{threads} CPUs"
                raise UsageError(
                    f"no node of the Ray cluster has {wanted}: start a node that has, or choose "
                    "another --device or fewer --threads"
                )
        except BaseException:
            ray.shutdown()
            raise
        self._pool = ThreadPoolExecutor(_MOST_BLOCKS, thread_name_prefix="ray-block")

    @property
    def lanes(self) -> int:
        """One more than fits now: a node never waits for this process, and a queue is what makes
        a cluster grow that can.
        """
        return min(self._room() + 1, _MOST_BLOCKS)

    def _room(self) -> int:
        return room(self._ray.nodes(), self._kind, self._threads, self._accelerator)

    def survey(self) -> Environment:
        """One of the nodes that cells will run on. Raises UsageError where its device fails."""
        job = SurveyJob(self._kind, self._threads)
        try:
            reply = self._call(survey_on_node, msgspec.json.encode(job))
        except self._ray.exceptions.RayError as error:
            raise UsageError(f"a node of the Ray cluster cannot be used: {_cause(error)}") from None
        # The rows say which node measured them; the run goes by one name, whichever node this is.
        return replace(msgspec.json.decode(reply, type=Environment), machine=machine_name())

    def submit(self, block: Block) -> Future[list[Row]]:
        return self._pool.submit(self._rows, block)

    def _rows(self, block: Block) -> list[Row]:
        exceptions = self._ray.exceptions
        job = NodeJob(code_fingerprint(), self._limit_s, msgspec.Raw(msgspec.json.encode(block)))
        losses: list[str] = []
        while len(losses) < 2:
            try:
                reply = self._call(measure_on_node, msgspec.json.encode(job))
                return msgspec.json.decode(reply, type=list[Row])
            except exceptions.TaskCancelledError:
                raise
            except exceptions.RayTaskError as error:
                return _rows_without_node(block, "failed", _cause(error))
            except exceptions.OutOfMemoryError as error:
                return _rows_without_node(block, "oom", f"ended by Ray: {_cause(error)}")
            except exceptions.RayError as error:
                losses.append(_cause(error))
        reason = f"its node or worker was lost twice: {'; then '.join(losses)}"
        return _rows_without_node(block, "crashed", reason)

    def _call(self, function: Callable[[bytes], bytes], argument: bytes) -> bytes:
        """Run `function` on a node. A second try is made by `_row`, not by Ray, so that a want of
        memory is told apart from a lost node.
        """
        remote = self._ray.remote(max_calls=1, max_retries=0, **self._options)(function)
        with self._lock:
            if self._closed:
                raise ProcessesClosed
            ref = remote.remote(argument)
            self._running.add(ref)
        try:
            reply: bytes = self._ray.get(ref)
            return reply
        finally:
            with self._lock:
                self._running.discard(ref)

    def close(self) -> None:
        """Ends what runs, leaves the cluster as it was."""
        with self._lock:
            self._closed = True
            left = list(self._running)
        for ref in left:
            self._ray.cancel(ref)
        if left:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=_CANCEL_S)
        for ref in left:
            self._ray.cancel(ref, force=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ray.shutdown()


def room(
    nodes: Iterable[Mapping[str, Any]], kind: Kind, threads: int, accelerator: str | None
) -> int:
    """How many blocks the nodes that live can take at once; `nodes` are those of ray.nodes()."""
    total = 0
    for node in nodes:
        resources = node["Resources"] if node["Alive"] else {}
        if kind == "cpu":
            total += int(resources.get("CPU", 0)) // threads
        elif accelerator is None or _ACCELERATOR + accelerator in resources:
            total += int(resources.get("GPU", 0))
    return total


def choose_accelerator(
    nodes: Iterable[Mapping[str, Any]], kind: Kind, asked: str | None
) -> str | None:
    """The type of GPU that all cells of a run are measured on; None where Ray names no type.

    Raises UsageError where there are several and none is asked for, or not the one asked for.
    """
    if kind == "cpu":
        return None
    types = sorted(
        {
            name.removeprefix(_ACCELERATOR)
            for node in nodes
            if node["Alive"]
            for name in node["Resources"]
            if name.startswith(_ACCELERATOR)
        }
    )
    if asked is not None:
        if asked not in types:
            raise unknown("accelerator of the Ray cluster", asked, types or ["none"])
        return asked
    if len(types) > 1:
        raise UsageError(
            f"the Ray cluster has GPUs of several types ({', '.join(types)}), and one run compares "
            "cells on one: choose it with --accelerator"
        )
    return types[0] if types else None


def _options(kind: Kind, threads: int, accelerator: str | None) -> dict[str, Any]:
    if kind == "cpu":
        return {"num_cpus": threads}
    return {"num_gpus": 1} | ({} if accelerator is None else {"accelerator_type": accelerator})


def _import_ray() -> Any:
    os.environ.update(RAY_SETTINGS)
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError(
            f"the engine 'ray' needs Ray ({error}): install resblock-bench[ray] on every node"
        ) from None
    return ray


def _require_answer(address: str) -> None:
    """Raises UsageError where nobody answers at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto" and the like are looked up on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"no Ray cluster can be used at {address!r} ({_cause(error)}): start one with 'ray "
        "start --head', and on further nodes 'ray start --address HOST:6379'"
    )


def _connect(ray: Any, address: str) -> None:
    if address == "auto":  # as Ray has it
        address = os.environ.get("RAY_ADDRESS", address)
    _require_answer(address)
    # Ray takes SIGTERM for itself, by which a sweep is told to end in good order.
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _cause(error: Exception) -> str:
    """The first line of what went wrong on a node, without Ray's report around it."""
    inner = getattr(error, "cause", None) or error
    return str(inner) if isinstance(inner, UsageError) else first_line(inner)


def _rows_without_node(block: Block, status: Status, reason: str) -> list[Row]:
    """Rows for a block of which no node has told anything: not this machine's name, either."""
    return [
        row_of(
            task,
            status,
            reason,
            device_name="unknown",
            device_uuid=None,
            host="unknown",
            versions=dict.fromkeys(task.environment.versions),
        )
        for task in block
    ]
