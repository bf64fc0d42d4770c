"""What a cell's step will need, found without computing it.

The step runs on fake tensors, which have shapes and storages' sizes but no data, under the same
tracker that measures real CPU cells; there the prediction equals the measurement. For a GPU cell
it counts the tensors of the CPU's operators, without a GPU library's workspaces.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.records import Cell, Memory

from .memory import TrackerMeter
from .workload import Workload, draw_inputs, draw_weights, unsupported


def predict_memory(cell: Cell) -> Memory | None:
    """The predicted memory of a cell; None where no prediction can be made."""
    meter = TrackerMeter("fake_tensors")
    if unsupported(cell) or meter.unusable(cell.impl):
        return None
    cpu = torch.device("cpu")
    with FakeTensorMode():
        workload = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, cpu, 0), cpu)
        return meter.measure(workload)
