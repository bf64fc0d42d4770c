"""Against a real Ray cluster of two nodes on this machine, of which one is killed."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.measure.cell import Task, id_of
from resblock_bench.bench.measure.fingerprint import code_fingerprint
from resblock_bench.bench.records import Row
from resblock_bench.bench.sweep import ray_node
from resblock_bench.bench.sweep.engines import LocalEngine
from resblock_bench.bench.sweep.ray_engine import RAY_SETTINGS, RayEngine, choose_accelerator, room
from resblock_bench.bench.sweep.schedule import blocks_of, run_blocks

os.environ.update(RAY_SETTINGS)
ray = pytest.importorskip("ray", reason="needs the extra [ray]")

pytestmark = pytest.mark.slow

VARYING = {
    "samples_ms", "median_ms", "ci_low_ms", "ci_high_ms", "outliers", "throughput_images_per_s",
    "warmup_s", "block", "conditions", "floor", "started_at", "wall_s", "overhead_s",
    "memory_limit_bytes",
}  # fmt: skip


def unchanging(row: Row) -> dict[str, Any]:
    fields = {name: value for name, value in vars_of(row).items() if name not in VARYING}
    return fields | {"memory": replace(row.memory, process_bytes=None)} if row.memory else fields


def vars_of(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cluster's nodes make their temporary folders."""
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """A head with one CPU and a further node with one."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("RAY_TMPDIR", "/tmp")  # The paths of Ray's sockets must be short.
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, filter(None, paths))))
        common = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        # How soon a dead node is noticed.
        health = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        nodes = Cluster(
            initialize_head=True, head_node_args={**common, "num_cpus": 1, "_system_config": health}
        )
        nodes.doomed = nodes.add_node(**common, num_cpus=1)
        try:
            yield nodes
        finally:
            nodes.shutdown()


@pytest.fixture
def connect(cluster: Any) -> Iterator[Callable[..., RayEngine]]:
    engines: list[RayEngine] = []

    def start(**options: Any) -> RayEngine:
        engines.append(
            RayEngine(
                "cpu", **{"threads": 1, "limit_s": 600, "address": cluster.address, **options}
            )
        )
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def wait_for(what: Callable[[], object], limit_s: float = 180.0) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def count_calls(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The argument of each Ray task that the engine begins from now on."""
    calls: list[bytes] = []
    call = engine._call

    def counted(function: Any, argument: bytes) -> bytes:
        calls.append(argument)
        return call(function, argument)

    monkeypatch.setattr(engine, "_call", counted)
    return calls


def test_a_sweep_survives_the_loss_of_a_node(
    cluster: Any,
    connect: Callable[..., RayEngine],
    make_task: Callable[..., Task],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine = connect()
    assert engine.lanes == 3, "two CPUs, and one to wait"
    calls = count_calls(engine, monkeypatch)
    tasks = [make_task(batch=1), make_task(impl="killed", batch=2), make_task(batch=2)]

    raylet = cluster.doomed.all_processes["raylet"][0].process.pid

    def lose_a_node() -> None:
        wait_for(lambda: any(raylet in ancestors(pid) for pid in processes(b"measure_on_node")))
        cluster.remove_node(cluster.doomed, allow_graceful=False)

    loss = threading.Thread(target=lose_a_node)
    loss.start()
    rows = {row.id: row for row in run_blocks(blocks_of(tasks), engine, oom=None)}
    loss.join()
    assert "".join(capfd.readouterr()) == "", "Ray keeps its reports to itself"
    assert len(calls) == 2 + 1, "the lost block once more, the one with a killed cell not"
    assert list(rows) and set(rows) == {id_of(task) for task in tasks}
    killed = rows[id_of(tasks[1])]
    assert killed.status == "crashed"
    assert killed.reason == "killed by SIGKILL, in its phase 'check'"
    assert engine.lanes == 2
    with closing(LocalEngine("cpu", threads=1, limit_s=600)) as local:
        for task in (tasks[0], tasks[2]):
            row = rows[id_of(task)]
            assert row.status == "ok"
            (own,) = local.submit([task]).result()
            assert unchanging(row) == unchanging(own)


def test_closing_ends_the_cells_and_leaves_nothing(
    connect: Callable[..., RayEngine], make_task: Callable[..., Task], folder: Path
) -> None:
    def folders() -> set[Path]:
        return set(folder.glob("*-resblock-bench"))

    engine = connect()
    # A node that another test has killed leaves its folder.
    before, left = cells(), folders()
    running = engine.submit([make_task(impl="hanging")])
    wait_for(lambda: cells() - before and any(any(new.iterdir()) for new in folders() - left))
    engine.close()
    assert running.done() and running.exception() is not None
    wait_for(lambda: not cells() - before)
    wait_for(lambda: not folders() - left)
    assert not ray.is_initialized()


def cells() -> set[int]:
    """Processes of cells, and the servers they are forked from."""
    return processes(b"resblock_bench.bench.machine.server")


def processes(part: bytes) -> set[int]:
    """Those with `part` in their command line."""
    paths = Path("/proc").glob("[0-9]*/cmdline")
    return {int(path.parent.name) for path in paths if part in _read(path)}


def ancestors(pid: int) -> list[int]:
    """Its parent, the parent of that, and so on."""
    found = []
    while pid:
        stat = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
        pid = int(stat[1]) if stat else 0
        found.append(pid)
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_connecting_leaves_sigterm_to_the_sweep(connect: Callable[..., RayEngine]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    connect()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_cluster_without_room_is_refused(connect: Callable[..., RayEngine]) -> None:
    with pytest.raises(UsageError, match="no node of the Ray cluster has 64 CPUs"):
        connect(threads=64)
    assert not ray.is_initialized()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayEngine]:
    """An engine whose calls a test answers itself."""
    node = {"Alive": True, "Resources": {"CPU": 1.0}}
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    with closing(RayEngine("cpu", threads=1, limit_s=60)) as engine:
        yield engine


@pytest.fixture
def answer(
    offline: RayEngine, make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Row]:
    """The row of a task of which each try ends with the next error; all must be used up."""

    def row_after(*errors: Exception) -> Row:
        left = list(errors)

        def call(function: Any, argument: bytes) -> bytes:
            raise left.pop(0)

        monkeypatch.setattr(offline, "_call", call)
        task = make_task()
        (row,) = offline.submit([task]).result()
        assert not left
        assert row.id == id_of(task)
        assert row.host == row.device_name == "unknown"
        return row

    return row_after


def test_a_cell_lost_twice_is_crashed(answer: Callable[..., Row]) -> None:
    row = answer(
        ray.exceptions.NodeDiedError("node a is gone\nmore"), ray.exceptions.WorkerCrashedError()
    )
    assert row.status == "crashed"
    assert row.reason is not None
    first, second = row.reason.split("; then ")
    assert first == "its node or worker was lost twice: NodeDiedError: node a is gone"
    assert second.startswith("WorkerCrashedError: ")


def test_what_ray_ends_for_want_of_memory_is_not_tried_again(answer: Callable[..., Row]) -> None:
    row = answer(ray.exceptions.OutOfMemoryError("node a is full"))
    assert (row.status, row.reason) == ("oom", "ended by Ray: OutOfMemoryError: node a is full")


def test_what_a_node_refuses_is_said_in_its_words(answer: Callable[..., Row]) -> None:
    refusal = UsageError("node a has other code")
    row = answer(ray.exceptions.RayTaskError("f", "a long report", refusal))
    assert (row.status, row.reason) == ("failed", "node a has other code")


def test_no_ray_and_no_cluster_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(**options: object) -> None:
        raise ConnectionError("could not find any running Ray instance")

    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", nowhere)
        with pytest.raises(UsageError, match=r"could not find any.*ray start --head"):
            RayEngine("cpu", threads=1, limit_s=60)
    with monkeypatch.context() as patch, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # listens to nobody
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        patch.setattr(ray, "init", lambda **options: pytest.fail("Ray waits for minutes"))
        for named in (address, f"ray://{address}", "127.0.0.1:99999"):
            patch.setenv("RAY_ADDRESS", named)
            with pytest.raises(UsageError, match=rf"{named}.*ray start --head"):
                RayEngine("cpu", threads=1, limit_s=60)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"install resblock-bench\[ray\]"):
        RayEngine("cpu", threads=1, limit_s=60)


def gpu_node(gpus: int, *types: str, alive: bool = True) -> dict[str, Any]:
    marks = {f"accelerator_type:{name}": 1.0 for name in types}
    return {"Alive": alive, "Resources": {"CPU": 8.0, "GPU": float(gpus), **marks}}


def test_room_counts_whole_cells_of_nodes_that_live() -> None:
    nodes = [gpu_node(4, "H100"), gpu_node(2, "A100"), gpu_node(8, "H100", alive=False)]
    assert room(nodes, "cuda", 8, None) == 6
    assert room(nodes, "cuda", 8, "H100") == 4
    assert room(nodes, "cpu", 3, None) == 4, "three of eight CPUs twice on each, none on both"


def test_one_run_is_measured_on_one_type_of_gpu() -> None:
    both = [gpu_node(4, "H100"), gpu_node(2, "A100"), gpu_node(8, "L4", alive=False)]
    with pytest.raises(UsageError, match=r"several types \(A100, H100\).*--accelerator"):
        choose_accelerator(both, "cuda", None)
    assert choose_accelerator(both, "cuda", "A100") == "A100"
    assert choose_accelerator(both[:1], "cuda", None) == "H100"
    assert choose_accelerator([gpu_node(4)], "cuda", None) is None
    assert choose_accelerator(both, "cpu", None) is None
    with pytest.raises(UsageError, match="unknown accelerator of the Ray cluster 'H10'"):
        choose_accelerator(both, "cuda", "H10")


def test_a_node_with_other_code_refuses_before_it_reads_the_task() -> None:
    job = ray_node.NodeJob("0" * 12, 60.0, msgspec.Raw(b'{"newer": 1}'))
    with pytest.raises(
        UsageError, match=rf"other code \({code_fingerprint()}\) than the run \(0+\)"
    ):
        ray_node.measure_on_node(msgspec.json.encode(job))


def test_a_node_reports_itself(make_task: Callable[..., Task]) -> None:
    """What the run's environment says of another machine, its ceilings too, is not this node's."""
    task = make_task()
    there = replace(task.environment, cpu="another", versions={"torch": "1.0"}, commit="0" * 40)
    block = [replace(each, environment=there) for each in (make_task(impl="fused"), task)]
    job = ray_node.NodeJob(code_fingerprint(), 60.0, msgspec.Raw(msgspec.json.encode(block)))
    rows = msgspec.json.decode(ray_node.measure_on_node(msgspec.json.encode(job)), type=list[Row])
    assert [row.axes for row in rows] == [task.cell for task in block]
    assert len({row.block for row in rows}) == 1
    row = rows[1]
    assert row.status == "ok"
    assert (row.versions, row.commit) == (task.environment.versions, task.environment.commit)
    assert row.device_name == task.environment.cpu
