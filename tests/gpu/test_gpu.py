"""The kernels on a real GPU: `make test-gpu`. Skipped where there is none.

What the interpreter cannot show: machine code, races, launches that wait for each other, 64-bit
offsets, graph capture, the compiler. Everything else is tested without a GPU, in tests/kernels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.oracle import NAMES, Problem, check, error, gradients, problem
from support.running import run_operator
from torch import Tensor

from resblock_bench.bench.measure.cuda_graph import capture
from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell
from resblock_bench.bench.tune.cases import (
    CallTruth,
    Case,
    draw_case,
    launched,
    mistake,
    poisoned,
    same_bits,
    truth_of,
)
from resblock_bench.kernels import ResBlock, dispatch, prefer, tiers, words
from resblock_bench.kernels.blocks import CheckpointMode
from resblock_bench.kernels.tiers import Direction, Launch, Tier

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.interpreting(),
    reason="needs a GPU, and no interpreter",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = Path(__file__).parents[1] / "data" / "resblock_shapes.csv"


def on_gpu(p: Problem) -> Problem:
    tensors = {name: getattr(p, name) for name in ("x", "dy", *NAMES)}
    return replace(p, **{k: t if t is None else t.cuda() for k, t in tensors.items()})


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", ["A", "B", "C", "D"])
def test_every_tier(tier: Tier, dtype: torch.dtype, channels_last: bool) -> None:
    for C, groups, spatial in ((96, 32, (8, 8)), (60, 2, (9, 7)), (64, 32, (16, 8))):
        p = on_gpu(
            problem(
                3, C, *spatial, groups=groups, dtype=dtype, pre_shift=True,
                channels_last=channels_last,
            )
        )  # fmt: skip
        with prefer("triton", tier):
            check(run_operator, p)
            first, second = gradients(run_operator, p), gradients(run_operator, p)
        assert all(torch.equal(first[name], second[name]) for name in first)


def published_norms() -> list[tuple[int, int, int]]:
    with SHAPES.open() as file:
        return sorted({(int(r["c_in"]), int(r["h"]), int(r["w"])) for r in csv.DictReader(file)})


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("C", "h", "w"), published_norms())
def test_every_published_norm(C: int, h: int, w: int, channels_last: bool) -> None:
    p = problem(2, C, h, w, groups=32, dtype=torch.bfloat16, channels_last=channels_last)
    check(run_operator, on_gpu(p))


# Launches with tickets, whose programs wait for each other. A race shows itself now and then, so
# they are repeated; and within `poisoned`, since a partial sum that is read before it is stored
# would else be that of the run before, and right.


@pytest.fixture
def counters() -> Iterator[dict[tuple[torch.device, int], Tensor]]:
    """The counters of each stream that the test launches on; zero after it."""
    words._of_stream.clear()
    try:
        yield words._of_stream
        torch.cuda.synchronize()
        assert words._of_stream
        assert not any(row.any() for row in words._of_stream.values())
    finally:
        words._of_stream.clear()  # What is not zero would break the tests that follow.


def ticket_launches(direction: Direction, site: tiers.Problem, tier: Tier) -> list[Launch]:
    """As planned; with the least lag, so that most wait; and in small parts with the least lag."""
    machine, _ = dispatch._machine(torch.device("cuda", torch.cuda.current_device()))
    if site.channels_last:  # Where L2 does not hold all of a call, C is refused. Both launch alike.
        tier = "D"
    choice = tiers.rule_choice(direction, site, machine, tier)
    planned = tiers.shape(direction, site, machine, choice)
    small = tiers.shape(direction, site, machine, choice._replace(tile=256, waves=1, tiles=1))
    assert planned.parts > 1 and small.parts > 1
    return [planned, *(how._replace(lag=how.parts) for how in (planned, small))]


def drawn(direction: Direction, site: tiers.Problem) -> tuple[Case, CallTruth]:
    device = torch.device("cuda", torch.cuda.current_device())
    case = draw_case(direction, site, torch.float32, device, 0)
    return case, truth_of(case)


def run_poisoned(case: Case, how: Launch) -> Tensors:
    with poisoned():
        return launched(case, how)


def assert_same(results: Tensors, expected: Tensors) -> None:
    assert results.keys() == expected.keys()
    for name, wanted in expected.items():
        assert same_bits(results[name], wanted), name


def start_together(streams: Sequence[torch.cuda.Stream]) -> None:
    """What is queued on these streams from here on waits for a moment, and then starts at once.

    The host queues a launch more slowly than the GPU runs it: none would overlap another.
    """
    torch.cuda._sleep(50_000_000)  # clock cycles
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())


# N, C, HW and G. The few programs of two launches are all resident at once; a large unit is one
# that L2 does not hold.
MANY, UNEVEN, ONE_GROUP = (64, 128, 4096, 32), (5, 60, 4095, 6), (2, 256, 4096, 1)
FEW, LARGE = (2, 64, 4096, 8), (2, 16, 1024 * 1024, 1)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("tier", "sizes"),
    [("C", MANY), ("C", UNEVEN), ("C", ONE_GROUP), ("D", LARGE)],
    ids=["C many", "C uneven", "C one group", "D"],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ticket_launches_repeat(
    direction: Direction,
    tier: Tier,
    sizes: tuple[int, ...],
    channels_last: bool,
    counters: dict[object, Tensor],
) -> None:
    site = tiers.Problem(*sizes, channels_last, 4)
    case, truth = drawn(direction, site)
    for how in ticket_launches(direction, site, tier):
        first = run_poisoned(case, how)
        assert mistake(first, truth) is None, (how, mistake(first, truth))
        for _ in range(100):
            assert_same(run_poisoned(case, how), first)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("tier", "sizes"), [("C", FEW), ("D", LARGE)], ids=["C", "D"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ticket_launches_on_two_streams_at_once(
    direction: Direction,
    tier: Tier,
    sizes: tuple[int, ...],
    channels_last: bool,
    counters: dict[object, Tensor],
) -> None:
    site = tiers.Problem(*sizes, channels_last, 4)
    case, truth = drawn(direction, site)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for how in ticket_launches(direction, site, tier):
        expected = run_poisoned(case, how)
        assert mistake(expected, truth) is None, (how, mistake(expected, truth))
        for _ in range(10):
            found = []
            start_together(streams)
            for stream in streams * 10:
                with torch.cuda.stream(stream):
                    found.append(run_poisoned(case, how))
            torch.cuda.synchronize()
            for results in found:
                assert_same(results, expected)
    assert len(counters) == 3  # and those of the stream that `expected` is from


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("tier", "sizes"), [("C", FEW), ("D", LARGE)], ids=["C", "D"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_captured_ticket_launches_are_replayed_at_once(
    direction: Direction,
    tier: Tier,
    sizes: tuple[int, ...],
    channels_last: bool,
    counters: dict[object, Tensor],
) -> None:
    """Two graphs that were captured on one stream, one alone and both on streams of their own."""
    site = tiers.Problem(*sizes, channels_last, 4)
    case, truth = drawn(direction, site)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for how in ticket_launches(direction, site, tier):
        expected = run_poisoned(case, how)  # compiles, which cannot happen under capture
        assert mistake(expected, truth) is None, (how, mistake(expected, truth))
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        captured = []
        for graph in graphs:
            with torch.cuda.graph(graph):
                captured.append(run_poisoned(case, how))  # a replay poisons, too
        for count in (1, *(2,) * 20):
            start_together(streams)
            for _ in range(10):
                for stream, graph in zip(streams[:count], graphs[:count], strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
            torch.cuda.synchronize()
            for results in captured[:count]:
                assert_same(results, expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_more_than_2_to_the_31_elements(channels_last: bool) -> None:
    """The last sample, which lies beyond 32-bit offsets, comes out as when it is alone."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(9, 256, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    alone = x[-1:].clone(memory_format=torch.preserve_format).requires_grad_()
    x.requires_grad_()
    y, y_alone = run_operator(Problem(x, x, 32)), run_operator(Problem(alone, alone, 32))
    torch.testing.assert_close(y[-1:], y_alone)
    dy = torch.ones_like(y_alone)
    (dx_alone,) = torch.autograd.grad(y_alone, alone, dy)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda").bfloat16().expand(y.shape))
    torch.testing.assert_close(dx[-1:], dx_alone)


def block_and_inputs(checkpoint: CheckpointMode) -> tuple[ResBlock, Tensor, Tensor]:
    torch.manual_seed(0)
    block = ResBlock(64, 128, 0.1, use_scale_shift_norm=True, checkpoint=checkpoint).cuda()
    torch.nn.init.normal_(block.out_layers[3].weight, std=0.02)
    return block, torch.randn(4, 64, 16, 16).cuda(), torch.randn(4, 128).cuda()


def step(block: torch.nn.Module, x: Tensor, emb: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = block(leaf, emb)
    return [y, *torch.autograd.grad(y.float().square().sum(), [leaf, *block.parameters()])]


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_compiles_with_inductor(checkpoint: CheckpointMode) -> None:
    block, x, emb = block_and_inputs(checkpoint)
    block.eval()  # inductor draws its own random numbers
    compiled = torch.compile(block, fullgraph=True)
    for graph, eager in zip(step(compiled, x, emb), step(block, x, emb), strict=True):
        torch.testing.assert_close(graph, eager, rtol=2e-2, atol=2e-2)


def test_graph_capture_replays_with_new_masks() -> None:
    p = on_gpu(problem(2, 64, 16, 16, groups=32))
    run_operator(p, dropout_p=0.5)  # compiles, which cannot happen under capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_operator(p, dropout_p=0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    expected = run_operator(p)
    for drawn in (first, y):
        torch.testing.assert_close(drawn, torch.where(drawn != 0, 2 * expected, 0.0))
    assert not torch.equal(first != 0, y != 0)


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("impl", ["reference", "compiled", "fused"])
@pytest.mark.parametrize("mode", ["inference", "forward", "train"])
def test_a_captured_step_has_the_results_of_the_step(mode: str, impl: str, checkpoint: str) -> None:
    cell = Cell(
        model=None, dims=2, resolution=16, channels=64, out_channels=128, emb_channels=128,
        conditioning="scale_shift", dropout=0.0, updown="none", batch=4, dtype="fp32",
        layout="nchw", mode=mode, impl=impl, checkpoint=checkpoint,
    )  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device())
    workload = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, device, 0), device)
    expected = workload.results()
    replay = capture(workload)
    leaves = workload.leaves() if mode == "train" else {}
    for leaf in leaves.values():
        assert leaf.grad is not None
        leaf.grad.zero_()
    for _ in range(2):  # gradients are written, not added up
        found = {"out": replay(), **{f"grad {name}": leaf.grad for name, leaf in leaves.items()}}
    torch.cuda.synchronize()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_autocast(checkpoint: CheckpointMode) -> None:
    block, x, emb = block_and_inputs(checkpoint)
    block.eval()
    exact = step(block, x, emb)
    with torch.autocast("cuda", torch.bfloat16):
        found = step(block, x, emb)
    for a, b in zip(found, exact, strict=True):
        assert error(a, b.double()) < 5e-2
