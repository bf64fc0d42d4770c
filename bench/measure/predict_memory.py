"""What a cell's step will need, found without computing it.

The step runs on fake tensors, which have shapes and storages' sizes but no data, under the same
tracker that measures real CPU cells; there the prediction equals the measurement. For a GPU cell
it counts the tensors of the CPU's operators, without a GPU library's workspaces.
"""

import gc

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.records import Cell, Memory, site_of

from .implementations import not_offered, unusable_here
from .kinds import KINDS
from .memory import TrackerMeter
from .models import ModelWorkload, empty_model_weights
from .peers import PEERS
from .workload import Workload, unsupported

_METER = TrackerMeter("fake_tensors")


class MemoryOracle:
    """Predicts cells one by one.

    A model that comes after another variant of itself takes over its parameters, AdamW's states and
    moving average: to make them takes as many operations as a step.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._model: ModelWorkload | None = None

    def memory(self, cell: Cell) -> Memory | None:
        """The predicted memory of a cell; None where no prediction can be made."""
        if unpredictable(cell):
            return None
        with self._mode:
            workload = self._workload(cell)
            # Measuring collects garbage again and again, and what is there by now is none.
            gc.freeze()
            return _METER.measure(workload)

    def _workload(self, cell: Cell) -> Workload:
        if self._model is not None and site_of(self._model.cell) == site_of(cell):
            self._model.turn_into(cell)
            return self._model
        self._model = None
        workload = fake_workload(cell)
        if isinstance(workload, ModelWorkload):
            self._model = workload
        return workload


def predict_memory(cell: Cell) -> Memory | None:
    """The predicted memory of a cell; None where no prediction can be made."""
    return MemoryOracle().memory(cell)


def unpredictable(cell: Cell) -> str | None:
    """Why no prediction can be made of a cell, or None."""
    here = unusable_here(cell.impl, "cpu") if cell.impl in PEERS else not_offered(cell.impl)
    return unsupported(cell) or here or _METER.unusable(cell.impl)


def fake_workload(cell: Cell) -> Workload:
    """A cell's step, of tensors without data in a FakeTensorMode."""
    device, kind = torch.device("cpu"), KINDS[cell.workload]
    if cell.workload == "block":
        return kind.drawn(cell, device, 0)
    # Nobody reads their values; to draw them takes as many operations as a forward pass.
    return kind.make(cell, empty_model_weights(cell), kind.draw_inputs(cell, device, 0), device)
