"""What tests run in processes that may not allocate much: an argument is MiB and threads."""

import msgspec
import torch
from torch import Tensor

from resblock_bench.bench.machine.channel import Channel
from resblock_bench.bench.measure.memory_limit import limit_memory
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights

from .cells import TINY


def _limit(argument: bytes) -> None:
    mib, threads = map(int, argument.split())
    torch.set_num_threads(threads)
    assert limit_memory(mib * 2**20)


def allocate_too_much(argument: bytes, channel: Channel) -> bytes:
    """100 MiB beside 20."""
    _limit(argument)
    fits = torch.ones(20 * 2**18)
    try:
        torch.ones(100 * 2**18)
    except RuntimeError as error:
        assert "DefaultCPUAllocator: can't allocate memory" in str(error), error
    else:
        return b"allocated"
    return f"refused, and {float(fits.sum())} go on".encode()


def allocate_mebibytes(argument: bytes, channel: Channel) -> bytes:
    """How many MiB there are, one by one."""
    _limit(argument)
    held: list[Tensor] = []
    try:
        while True:
            held.append(torch.ones(2**18))
    except RuntimeError as error:
        assert "DefaultCPUAllocator" in str(error), error
    return str(len(held)).encode()


def compute_a_cell(argument: bytes, channel: Channel) -> bytes:
    """Whether a cell has its results."""
    _limit(argument)
    shape = {"resolution": 32, "channels": 64, "out_channels": 64, "emb_channels": 64, "batch": 2}
    how = {"conditioning": "add", "checkpoint": "full", "impl": "fused"}
    cell = msgspec.structs.replace(TINY, **shape, **how)
    cpu = torch.device("cpu")
    torch.ones(2**20).sum()  # enough for every thread to start
    made = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, cpu, 0), cpu)
    return str(len(made.results()) > 5).encode()
