"""How long a `run` takes on an H100, estimated from counts: rather too long than too short.

    a run       START_S, and its blocks one after the other
    a block     its truths, then its variants
    truths      two, for the first inputs and for the last: operations in float64, and their bytes,
                which are compared with eager's results and written
    a variant   VARIANT_S, SAMPLINGS times its sampling, and both truths, which are read and
                compared; COMPILE_S under torch.compile

Of blocks operations are those of two convolutions of 3×3, and a truth holds the output and the
gradient of x; of models it holds the gradients of all parameters, which have to be drawn besides.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from resblock_bench.bench.grid.axes import parse_arguments
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.records import Cell, site_of

START_S = 25.0
"""To import PyTorch, start CUDA, and measure the ceilings; at the end to compile what is
predicted."""
FLOAT64_FLOPS_PER_S = 3e12
"""An H100 has 34 TFLOP/s without tensor cores; of cuDNN's convolutions a few are expected."""
TRUTH_BYTES_PER_S = 5e8
"""From or to a file, over the bus, and compared."""
DRAWN_PER_S = 5e7
"""Parameters of a model, on the CPU."""
VARIANT_S = 10.0
"""A context, libraries, cuDNN's choice among algorithms, kernels, memory, the warm-up."""
SAMPLINGS = 2.7
"""Rounds with other inputs in between, and a graph's replays."""
COMPILE_S = 40.0

MODELS = {
    "adm-imagenet64-cond": (6.58e11, 295_904_454),
    "adm-imagenet128-cond": (1.841e12, 421_529_606),
    "adm-imagenet256-cond": (6.718e12, 553_838_086),
    "adm-upsample-64-256": (3.788e12, 311_795_910),
    "adm-upsample-128-512": (1.502e13, 308_835_270),
}
"""Operations of a training step an image, as `floor` counts them, and parameters."""


class RunEstimate(NamedTuple):
    """Seconds.

    run     all of it
    first   until the rows of its heaviest block are written, from the start of the program
    cell    the most that the truths of a site or one variant take
    """

    run: float
    first: float
    cell: float


class _Work(NamedTuple):
    """Of a site. operations: of a step; truth_bytes, drawn: of one truth."""

    operations: float
    truth_bytes: float
    drawn: float


def estimate(axes: Sequence[str], max_time_s: float) -> RunEstimate:
    """Of a `run` in train mode with these axes; `impl` may name what is not known here."""
    impls = ["reference"]
    others = []
    for axis in axes:
        name, _, values = axis.partition("=")
        if name == "impl":
            impls = values.split(",")
        else:
            others.append(axis)
    cells = plan([parse_arguments([*others, "impl=reference"])])
    modes = Counter(site_of(item.cell) for item in cells)
    blocks, longest = [], 0.0
    for site, count in modes.items():
        work = _work(site)
        held_s = 2 * (work.truth_bytes / TRUTH_BYTES_PER_S + work.drawn / DRAWN_PER_S)
        truths_s = 2 * work.operations / FLOAT64_FLOPS_PER_S + held_s
        variant_s = VARIANT_S + SAMPLINGS * max_time_s + held_s
        each = [variant_s + COMPILE_S * impl.startswith("compiled") for impl in impls]
        blocks.append(truths_s + count * sum(each))
        longest = max(longest, truths_s, *each)
    return RunEstimate(START_S + sum(blocks), START_S + max(blocks), longest)


def _work(site: Cell) -> _Work:
    if site.workload == "model":
        operations, parameters = MODELS[str(site.model)]
        return _Work(site.batch * operations, 8 * parameters, parameters)
    positions = {"none": 1.0, "up": 4.0, "down": 0.25}[site.updown] * site.resolution**2
    taps = 9 * (site.channels + site.out_channels) * site.out_channels
    forward = 2 * site.batch * taps * positions
    x, out = site.channels * site.resolution**2, site.out_channels * positions
    return _Work(3 * forward, 8 * (site.batch * (x + out) + taps), 0.0)
