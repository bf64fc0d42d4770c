"""Implementations that look fast and are not: none of them may come out as ok.

Each is right at first, as far as it can be told: what is kept, what is not waited for, what is left
out, what is less precise, and whose clock runs slowly.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.orders import FINISH, Given
from torch import Tensor, nn

from resblock_bench.bench.measure import cell as measuring
from resblock_bench.bench.measure import orders
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.correctness import Truth
from resblock_bench.bench.measure.truth_file import read_truth
from resblock_bench.bench.records import Row

Around = Callable[[nn.Module, Tensor, Tensor], Tensor]
TURNS = (*[orders.Redraw(), orders.Burst(60.0, 2)] * 3, FINISH)
MODES = ("inference", "forward", "train")


@pytest.fixture
def cheat(
    make_task: Callable[..., Task],
    measure_task: Callable[..., Row],
    add_implementation: Callable[..., None],
) -> Callable[..., Row]:
    """The row of an implementation that takes turns with others."""

    def measure(around: Around, before: Callable[..., object] = lambda o: None, **axes) -> Row:
        add_implementation("cheat", around)
        return measure_task(make_task(impl="cheat", **axes), Given(TURNS, before))

    return measure


def returning(what: Callable[[Tensor], Tensor], key: Callable[..., object]) -> Around:
    """What a call with the same key returned before, as it is or changed by `what`."""
    kept: dict[object, Tensor] = {}

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        found = key(x, emb)
        if found not in kept:
            kept[found] = module(x, emb)
        return what(kept[found])

    return around


def of_nothing(x: Tensor, emb: Tensor) -> object:
    return None


def of_shapes(x: Tensor, emb: Tensor) -> object:
    return x.shape, emb.shape, torch.is_grad_enabled()


def of_places(x: Tensor, emb: Tensor) -> object:
    return x.data_ptr(), emb.data_ptr(), torch.is_grad_enabled()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", [of_nothing, of_shapes, of_places])
@pytest.mark.parametrize("what", [lambda out: out, Tensor.clone], ids=["cached", "clone"])
def test_what_was_kept_is_wrong_for_other_inputs(
    cheat: Callable[..., Row], mode: str, key: Callable[..., object], what: Callable
) -> None:
    row = cheat(returning(what, key), mode=mode)
    # In training there is nothing left to go back through.
    assert row.status == ("failed" if mode == "train" else "wrong")
    if mode != "train":
        assert (row.reason or "").startswith("with other inputs than at first, out: relative error")


REMEMBERED: list[tuple[Tensor, ...]] = []


class Remembered(torch.autograd.Function):
    """Output and gradients of the first call, whatever comes later."""

    @staticmethod
    def forward(ctx, module, x, emb, *weights):  # type: ignore[no-untyped-def]
        if not REMEMBERED:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (x, emb, *weights)]
                out = module(*leaves[:2])
            REMEMBERED.append((out.detach(),))
        ctx.shapes = [tensor.shape for tensor in (x, emb, *weights)]
        ctx.run = lambda cotangent: first_gradients(module, x, emb, weights, cotangent)
        return REMEMBERED[0][0].clone()

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        if len(REMEMBERED) == 1:
            REMEMBERED.append(ctx.run(cotangent))
        return (None, *(gradient.clone() for gradient in REMEMBERED[1]))


def first_gradients(module, x, emb, weights, cotangent):  # type: ignore[no-untyped-def]
    with torch.enable_grad():
        x, emb = x.detach().requires_grad_(), emb.detach().requires_grad_()
        return torch.autograd.grad(module(x, emb), (x, emb, *weights), cotangent)


def test_nor_are_kept_gradients_right(cheat: Callable[..., Row]) -> None:
    REMEMBERED.clear()
    row = cheat(lambda module, x, emb: Remembered.apply(module, x, emb, *module.parameters()))
    assert len(REMEMBERED) == 2
    assert row.status == "wrong"
    assert (row.reason or "").startswith("with other inputs than at first")
    assert row.samples_ms is not None  # it was right at first


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_sees_what_has_changed_saves_nothing(
    cheat: Callable[..., Row], mode: str
) -> None:
    """No step has the inputs of the one before, also while memory is measured."""
    hits: list[object] = []
    kept: dict[str, object] = {}

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        key = (x.data_ptr(), x._version, emb.data_ptr(), emb._version)
        if kept.get("key") != key:
            kept["key"], kept["out"] = key, module(x, emb)
        else:
            hits.append(key)
        return kept["out"]  # type: ignore[return-value]

    row = cheat(around, mode=mode)
    assert hits == []
    assert row.status == "ok"
    assert row.memory is not None
    assert row.memory.peak_above_baseline_bytes > 2 * 32 * 8 * 8 * 4


@pytest.mark.parametrize("part", ["x", "emb", "cotangent"])
def test_nothing_that_depends_on_an_input_can_be_kept_for_the_next_step(
    make_task: Callable[..., Task], measure_task: Callable[..., Row],
    add_implementation: Callable[..., None], part: str,
) -> None:  # fmt: skip
    """A projection of the embedding that is computed once is no projection."""
    seen: list[float] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out, tensor):  # type: ignore[no-untyped-def]
            if part != "cotangent":
                seen.append(float(tensor.double().sum()))
            return out.view_as(out)

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            if part == "cotangent":
                seen.append(float(gradient.double().sum()))
            return gradient, None

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = Watched.apply(module(x, emb), emb if part == "emb" else x)
        return out

    add_implementation("watched", around)
    began: list[int] = []
    turns = [orders.Burst(60.0, 4), FINISH]
    channel = Given(turns, lambda order: began.append(len(seen)))
    assert measure_task(make_task(impl="watched", mode="train"), channel).status == "ok"
    timed = seen[began[0] : began[1]]
    assert len(timed) == 4
    assert len(set(timed)) == len(timed)


class Later:
    """Does something 20 ms later, in another thread."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, work: Callable[[], object]) -> None:
        def run() -> None:
            time.sleep(0.02)
            # What counts the memory of a step does not expect work in another thread.
            with torch.no_grad(), contextlib.suppress(Exception):
                work()

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join()


@pytest.fixture
def later() -> Iterator[Later]:
    made = Later()
    yield made
    made.wait()


def test_what_is_not_waited_for_is_not_there(cheat: Callable[..., Row], later: Later) -> None:
    """The result comes later, in memory that is there already."""

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        later(lambda: out.copy_(module(x, emb)))
        return out

    assert cheat(around, mode="inference").status == "wrong"


def test_nor_where_it_was_there_in_time_for_the_first_check(
    cheat: Callable[..., Row], later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where it is there by the time that the last results are looked at."""

    def read_slowly(path: Path) -> Truth:
        later.wait()
        return read_truth(path)

    monkeypatch.setattr(measuring, "read_truth", read_slowly)
    count = [0]
    buffers: list[Tensor] = []

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        count[0] += 1
        if count[0] <= 2:
            buffers[:] = [module(x, emb)]
        else:
            later(lambda: buffers[0].copy_(module(x, emb)))
        return buffers[0]

    # Others' turns are long enough for what was begun in the last one.
    row = cheat(around, lambda order: later.wait(), mode="inference")
    assert row.status == "wrong"
    assert (row.reason or "").startswith("with other inputs than at first")


@pytest.mark.parametrize("mode", MODES)
def test_a_lower_precision_is_wrong(cheat: Callable[..., Row], mode: str) -> None:
    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, emb).float()  # type: ignore[no-any-return]

    assert cheat(around, mode=mode).status == "wrong"


def test_a_lower_precision_after_the_first_check_is_wrong(cheat: Callable[..., Row]) -> None:
    count = [0]

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        count[0] += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=count[0] > 5):
            return module(x, emb).float()  # type: ignore[no-any-return]

    row = cheat(around, mode="inference")
    assert row.status == "wrong"
    assert (row.reason or "").startswith("with other inputs than at first")


def test_a_backward_pass_without_x_is_none(cheat: Callable[..., Row]) -> None:
    row = cheat(lambda module, x, emb: module(x.detach(), emb), mode="train")
    assert row.status == "failed"
    assert "the backward pass left no gradient for x" in (row.reason or "")


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_graph_has_to_be_recorded_where_the_step_says_so(
    cheat: Callable[..., Row], mode: str
) -> None:
    """Less is kept, and less is done, than the others do."""

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x, emb)  # type: ignore[no-any-return]

    assert cheat(around, mode=mode).status == "failed"


def test_nor_may_it_be_left_out_of_the_timed_steps(cheat: Callable[..., Row]) -> None:
    count = [0]

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        count[0] += 1
        with torch.set_grad_enabled(count[0] <= 5):
            return module(x, emb)  # type: ignore[no-any-return]

    assert cheat(around, mode="forward").status == "failed"


@pytest.mark.parametrize("clock", ["perf_counter_ns", "perf_counter", "monotonic", "time"])
def test_a_clock_that_was_replaced_times_nothing(
    cheat: Callable[..., Row], monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    """Samples are taken by the clock as it was before any implementation came."""
    true = getattr(time, clock)
    zero = true()
    slept_ms = 5.0

    def around(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        monkeypatch.setattr(time, clock, lambda: type(zero)(zero + (true() - zero) / 1000))
        time.sleep(1e-3 * slept_ms)
        return module(x, emb)  # type: ignore[no-any-return]

    try:
        row = cheat(around, mode="inference")
    finally:
        monkeypatch.undo()
    assert row.samples_ms is not None
    assert min(row.samples_ms) > slept_ms
