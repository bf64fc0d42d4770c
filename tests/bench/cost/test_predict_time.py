"""Predicted times against numbers worked by hand, on a GPU of round figures."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from resblock_bench.bench.cost.gpu_figures import FIGURES, GPUS, GpuFigures
from resblock_bench.bench.cost.predict_time import (
    LaunchWork,
    Part,
    Prediction,
    predict_call,
    sum_up,
)

ROUND = GpuFigures(
    multiprocessors=100,
    l2_bytes=40 * 2**20,
    peak_bytes_per_s=1.1e12,
    copy_bytes_per_s=1e12,
    l2_bytes_per_s=4e12,
    clock_hz=1e9,
    issue_lanes=128,
    issue_share=1.0,
    special_lanes=16,
    threads=2048,
    memory_latency_us=1.0,
    l2_latency_us=0.5,
    launch_us=2.0,
)
"""1 TB/s are 1 MB a microsecond, and 100 multiprocessors issue 12.8 million lanes in one."""


def part(programs: int, **changes: Any) -> Part:
    """Eight KiB in flight, one round trip, nothing to do."""
    fields: dict[str, Any] = {
        "read_bytes": 0.0,
        "written_bytes": 0.0,
        "l2_bytes": 0.0,
        "in_flight_bytes": 8192,
        "round_trips": 1.0,
        "instructions": 0.0,
        "special": 0.0,
    }
    return Part(programs, **fields | changes)


def launch(*parts: Part, occupancy: float = 0.5, launches: int = 1, warps: int = 8) -> LaunchWork:
    """Of 8 warps and half a multiprocessor: 4 programs at once, 400 on the machine."""
    return LaunchWork("kernel", launches, warps, occupancy, parts)


def predict(*parts: Part, **how: Any) -> Prediction:
    return predict_call([launch(*parts, **how)], ROUND)


def test_bound_by_memory() -> None:
    """400 programs of 25 turns: 82 MB read and as many written, over 1 MB/µs."""
    moved = 400 * 25 * 8192
    found = predict(part(400, read_bytes=moved, written_bytes=moved))
    assert found.bound == "memory"
    # The launch, then a trip to L2 and one to memory before the first byte.
    assert found.us == pytest.approx(2.0 + 1.5 + 2 * 81.92)
    assert found.shares_us == pytest.approx({"start": 3.5, "memory": 163.84})


def test_bound_by_l2() -> None:
    """All but a tenth read from L2, at four times the rate: 819.2 MB are 204.8 µs."""
    read = 400 * 250 * 8192
    found = predict(part(400, l2_bytes=read, read_bytes=read / 10))
    assert found.bound == "L2"
    assert found.us == pytest.approx(2.0 + 1.5 + 204.8)


def test_bound_by_bytes_in_flight() -> None:
    """16 programs keep 128 KiB in flight: 131 GB/s at a latency of 1 µs."""
    read = 16 * 64 * 8192
    found = predict(part(16, read_bytes=read))
    assert found.bound == "in flight"
    assert found.us == pytest.approx(2.0 + 0.5 + 64.0)
    assert read / 64e-6 == pytest.approx(16 * 8192 / 1e-6)  # Little's law
    # Twice as much of it in flight halves the turns.
    assert predict(part(16, read_bytes=read, in_flight_bytes=16384)).us == pytest.approx(34.5)


def test_bound_by_issue_slots() -> None:
    """1.28e9 lanes over 12.8e6 a microsecond."""
    read = 400 * 5 * 8192
    found = predict(part(400, read_bytes=read, instructions=1.28e9))
    assert found.bound == "issue"
    assert found.us == pytest.approx(3.5 + 100.0)


def test_bound_by_special_function_units() -> None:
    """16 of 128 lanes: a quarter of the instructions being special is twice their own bound."""
    found = predict(part(400, read_bytes=400 * 8192, instructions=1.28e9, special=3.2e8))
    assert found.bound == "special units"
    assert found.us == pytest.approx(3.5 + 200.0)


def test_programs_that_do_not_divide_among_multiprocessors() -> None:
    """250 on 100: three on the busiest, which 300 would also be."""
    assert predict(part(250, instructions=1.25e9, in_flight_bytes=1)).us == pytest.approx(
        predict(part(300, instructions=1.5e9, in_flight_bytes=1)).us
    )


def test_a_last_wave_of_few_programs_is_a_tail() -> None:
    """401 where 400 run at once, each waiting 64 times: twice the time of one wave."""

    def waiting(programs: int) -> Prediction:
        return predict(part(programs, read_bytes=programs * 64 * 8192, in_flight_bytes=8192))

    whole, more = waiting(400), waiting(401)
    assert whole.bound == "memory" and "tail" not in whole.shares_us  # 210 MB in 210 µs
    # The last program lives 64.5 µs, of which its share of the bytes is half a microsecond.
    assert more.us - whole.us == pytest.approx(64.5)
    assert more.shares_us["tail"] == pytest.approx(64.5 - 64 * 8192e-6)


def test_a_tail_of_many_programs_costs_their_bytes_alone() -> None:
    def streaming(programs: int) -> Prediction:
        return predict(part(programs, read_bytes=programs * 8 * 8192))

    assert streaming(800).us - streaming(600).us == pytest.approx(200 * 8 * 8192e-6)
    assert streaming(600).shares_us.get("tail", 0.0) == pytest.approx(0.0)


def test_bound_by_launches() -> None:
    """Sixteen small launches are sixteen times the start."""
    small = launch(part(100, read_bytes=100 * 4096), launches=16)
    found = predict_call([small], ROUND)
    assert found.bound == "start"
    assert found.us == pytest.approx(16 * predict_call([small._replace(launches=1)], ROUND).us)


def test_bound_by_the_host() -> None:
    work = launch(part(100, read_bytes=100 * 4096))
    device = predict_call([work], ROUND)
    assert predict_call([work], ROUND, host_us=device.us / 2) == device
    found = predict_call([work], ROUND, host_us=50.0)
    assert (found.us, found.bound) == (50.0, "host")
    assert sum(found.shares_us.values()) == pytest.approx(50.0)


def test_a_life_a_little_longer_than_the_bytes_hides_in_the_start() -> None:
    """400 programs of 4 turns: 13.1 µs of memory, of which none flows in the first 1.5 µs."""
    read = 400 * 4 * 8192
    busy = part(400, read_bytes=read, round_trips=19.5)  # a life of 9.75 + 4 = 13.75 µs
    found = predict(busy)
    assert found.bound == "memory"
    assert found.us == pytest.approx(2.0 + 9.75 + 1.0 + read / 1e6)


@pytest.mark.parametrize(("warps", "us"), [(1, 8.0), (2, 4.0), (4, 2.0), (8, 2.0)])
def test_a_program_alone_has_the_schedulers_of_its_warps(warps: int, us: float) -> None:
    """256,000 lanes: 32 a cycle for each scheduler, of which there are four."""
    alone = part(1, instructions=256_000, round_trips=0.0)
    assert predict(alone, warps=warps).us == pytest.approx(2.0 + us)
    special = part(1, special=32_000, round_trips=0.0)  # 4 a cycle for each
    assert predict(special, warps=warps).us == pytest.approx(2.0 + us)


def test_two_kinds_of_programs_overlap_in_one_launch() -> None:
    """What one kind computes while the other loads costs nothing, in two launches it does."""
    loads = part(200, read_bytes=200 * 50 * 8192)  # 82 µs of memory
    computes = part(200, instructions=0.64e9)  # 50 µs of instructions
    together = predict(loads, computes)
    apart = predict_call([launch(loads), launch(computes)], ROUND)
    assert together.bound == "memory"
    assert together.shares_us["memory"] == pytest.approx(81.92)
    assert apart.us > together.us + 50


@pytest.mark.parametrize("read", [1e5, 1e7, 1e9])
@pytest.mark.parametrize("instructions", [0.0, 1e8])
def test_more_programs_are_never_slower_until_each_multiprocessor_has_one(
    read: float, instructions: float
) -> None:
    times = [
        predict(part(programs, read_bytes=read, instructions=instructions)).us
        for programs in range(1, 101)
    ]
    assert all(after <= before + 1e-9 for before, after in pairwise(times))


@pytest.mark.parametrize("programs", [1, 16, 100, 399, 400, 401, 1000])
@pytest.mark.parametrize(
    "field", ["read_bytes", "written_bytes", "l2_bytes", "instructions", "special"]
)
def test_more_work_is_never_faster(programs: int, field: str) -> None:
    base = {"read_bytes": 1e7, "written_bytes": 1e7, "l2_bytes": 1e6, "instructions": 1e8}
    base["special"] = 1e7
    times = [
        predict(part(programs, **{**base, field: base[field] * grown})).us
        for grown in (1, 1.5, 2, 4, 16, 64, 256)
    ]
    assert all(after >= before - 1e-9 for before, after in pairwise(times))
    assert times[-1] > times[0]


def test_the_shares_add_up() -> None:
    found = sum_up([("memory", 3.0), ("start", 2.0), ("memory", 1.0), ("tail", 0.0)])
    assert found == Prediction(6.0, "memory", {"memory": 4.0, "start": 2.0})


def test_sixty_four_programs_of_an_h100_keep_half_a_megabyte_in_flight() -> None:
    """Channels-last backward of 512 channels at 256²: at 0.75 µs about 0.7 TB/s."""
    read = 64 * 1000 * 8192
    found = predict_call([launch(part(64, read_bytes=read, round_trips=0.0))], GPUS[90])
    assert found.bound == "in flight"
    assert read / (found.us * 1e-6) == pytest.approx(0.7e12, rel=0.01)


@pytest.mark.parametrize(("sums", "apply", "share"), [(25.0, 25.9, 0.82), (18.4, 18.3, 0.95)])
def test_instructions_cap_the_backward(sums: float, apply: float, share: float) -> None:
    """In two launches: sums read 4 bytes an element from memory, apply as many from L2, writes 2.

    At 3 TB/s, 1.755 GHz and 80 % of the issue slots, a large tensor.
    """
    gpu = GPUS[90]
    assert (gpu.copy_bytes_per_s, gpu.clock_hz, gpu.issue_share) == (3e12, 1.755e9, 0.8)
    elements, programs = 2.0**31, 132 * 4
    works = [
        launch(part(programs, read_bytes=4 * elements, instructions=sums * elements)),
        launch(
            part(
                programs,
                l2_bytes=4 * elements,
                written_bytes=2 * elements,
                instructions=apply * elements,
            )
        ),
    ]
    deep = [
        work._replace(parts=tuple(p._replace(in_flight_bytes=65536) for p in work.parts))
        for work in works
    ]
    floor_us = 6 * elements / 3e12 * 1e6
    assert floor_us / predict_call(deep, gpu).us == pytest.approx(share, abs=0.01)


def test_every_figure_says_where_it_stands() -> None:
    for arch, figures in FIGURES.items():
        assert set(figures) == set(GpuFigures._fields), arch
        for name, figure in figures.items():
            assert figure.value > 0 and len(figure.source) > 10, (arch, name)
        assert figures["copy_bytes_per_s"].value < figures["peak_bytes_per_s"].value
        assert figures["l2_latency_us"].value < figures["memory_latency_us"].value


def test_the_rules_launch_for_the_same_machines() -> None:
    from resblock_bench.bench.compiled.norms import MACHINES

    for arch, machine in MACHINES.items():
        assert (GPUS[arch].multiprocessors, GPUS[arch].l2_bytes) == machine
