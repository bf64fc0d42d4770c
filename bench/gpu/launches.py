"""Launches every kernel once, on tiny problems, and holds the results against float64.

    python -m resblock_bench.bench.gpu.launches --device cuda
    compute-sanitizer --tool memcheck python -m resblock_bench.bench.gpu.launches --device cuda

Every tier, direction, layout and dtype, with all that modulates, within poisoned memory. A line for
each that is not right, and one at the end. Exit code 5 where a result is wrong, 3 where a launch
failed; after one that broke the GPU's context nothing more can be launched.
"""

import sys
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer

from resblock_bench.bench import exitcodes
from resblock_bench.bench.errors import UsageError, first_line
from resblock_bench.kernels.tiers import Direction, Launch, Machine, Problem, Tier

HANG_S = 120.0
"""Under a sanitizer a launch takes many times as long."""
_SIZES = ((3, 64, 256, 32), (3, 96, 64, 32), (3, 60, 63, 2))
"""N, C, positions, groups: what tiles divide, and what they do not."""
_INTERPRETED = Machine(sms=6, l2_bytes=2**20)
"""On a CPU the machine that launches are shaped for: a program takes milliseconds there."""
_TIERS: tuple[Tier, ...] = ("A", "B", "C", "D")
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class TinyLaunch(NamedTuple):
    """What is launched; `name` says it."""

    name: str
    direction: Direction
    problem: Problem
    dtype: str
    how: Launch


def launches(machine: Machine, dtypes: list[str], sizes: int) -> Iterator[TinyLaunch]:
    """Everything that can be launched on the first so many sizes; a tier that cannot hold one is
    left out."""
    from resblock_bench.kernels.tiers import rule_choice, shape

    for N, C, HW, G in _SIZES[:sizes]:
        for tier in _TIERS:
            for direction in _DIRECTIONS:
                for channels_last in (False, True):
                    for dtype in dtypes:
                        bytes_each = 4 if dtype == "fp32" else 2
                        problem = Problem(N, C, HW, G, channels_last, bytes_each)
                        choice = rule_choice(direction, problem, machine, tier)
                        try:
                            how = shape(direction, problem, machine, choice)
                        except ValueError:
                            continue
                        layout = "nhwc" if channels_last else "nchw"
                        name = f"{tier} {direction} {layout} {dtype} {N}×{C}×{HW} by {G}"
                        yield TinyLaunch(name, direction, problem, dtype, how)


def main(
    device: Annotated[str, typer.Option(metavar="cuda|cpu")] = "cuda",
    sizes: Annotated[int, typer.Option(min=1, max=len(_SIZES), help="How many sizes.")] = len(
        _SIZES
    ),
    dtypes: Annotated[str, typer.Option(metavar="fp32,bf16,fp16")] = "fp32,bf16",
) -> None:
    try:
        code = carry_out(device, sizes, dtypes.split(","))
    except UsageError as error:
        print(f"resblock-bench: {error}", file=sys.stderr)
        code = exitcodes.USAGE
    raise typer.Exit(code)


def carry_out(device: str, sizes: int, dtypes: list[str]) -> int:
    import torch

    from resblock_bench.bench.measure.devices import device_kind
    from resblock_bench.bench.measure.workload import DTYPES
    from resblock_bench.bench.tune.cases import draw_case, launched, mistake, poisoned, truth_of
    from resblock_bench.bench.tune.gpu import DeviceLost, GpuBench, open_gpu
    from resblock_bench.kernels import dispatch

    gpu: GpuBench | None = None
    if device_kind(device) == "cuda":
        gpu = open_gpu()
        gpu = GpuBench(gpu.device, hang_s=HANG_S)
        machine, where = gpu.machine, gpu.device
    elif not (dispatch.triton_installed() and dispatch.interpreting()):
        raise UsageError(
            "on a CPU the kernels are interpreted: install Triton and set TRITON_INTERPRET=1"
        )
    else:
        machine, where = _INTERPRETED, torch.device("cpu")

    right, wrong, failed = 0, 0, 0
    for number, one in enumerate(launches(machine, dtypes, sizes)):
        case = draw_case(one.direction, one.problem, DTYPES[one.dtype], where, number)
        truth = truth_of(case)
        try:
            with poisoned():
                results = launched(case, one.how) if gpu is None else gpu.run(case, one.how)
            found = mistake(results, truth)
        except DeviceLost as error:
            print(f"{one.name}: {error}; nothing more can be launched in this process", flush=True)
            print(_summary(right, wrong, failed + 1), flush=True)
            assert gpu is not None
            return gpu.give_up(exitcodes.INCOMPLETE)
        except Exception as error:
            failed += 1
            print(f"{one.name}: {first_line(error)}", flush=True)
            continue
        if found is None:
            right += 1
        else:
            wrong += 1
            print(f"{one.name}: {found}", flush=True)
    print(_summary(right, wrong, failed), flush=True)
    if wrong:
        return exitcodes.WRONG
    return exitcodes.OK if right and not failed else exitcodes.INCOMPLETE


def _summary(right: int, wrong: int, failed: int) -> str:
    return f"{right} launches are right, {wrong} wrong, {failed} failed"


if __name__ == "__main__":
    typer.run(main)
