"""What a step can run, by the name that a cell has for it: how it is drawn and made runnable, and
how its contract describes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resblock_bench.bench.records import Cell, WorkloadKind

from . import models, workload
from .models import ModelWorkload, draw_model_inputs, draw_model_weights
from .workload import Workload, draw_inputs, draw_weights


@dataclass(frozen=True)
class Preparation:
    """How a workload comes about.

    draw_weights(cell, seed)                a state dict, on the CPU
    draw_inputs(cell, device, seed)         of the step
    make(cell, weights, inputs, device)     what is run
    steps, precision, inputs                for the contract, the steps by mode
    """

    draw_weights: Callable[[Cell, int], dict[str, Tensor]]
    draw_inputs: Callable[[Cell, torch.device, int], Any]
    make: Callable[[Cell, dict[str, Tensor], Any, torch.device], Workload]
    steps: Mapping[str, str]
    precision: str
    inputs: str

    def drawn(self, cell: Cell, device: torch.device, seed: int) -> Workload:
        """A cell's workload, weights and inputs of one seed."""
        weights, inputs = self.draw_weights(cell, seed), self.draw_inputs(cell, device, seed)
        return self.make(cell, weights, inputs, device)


def _of_models(steps: Mapping[str, str]) -> Preparation:
    return Preparation(
        draw_model_weights,
        draw_model_inputs,
        ModelWorkload,
        steps,
        models.MODEL_PRECISION,
        models.MODEL_INPUTS,
    )


KINDS: Mapping[WorkloadKind, Preparation] = {
    "block": Preparation(
        draw_weights, draw_inputs, Workload, workload.STEPS, workload.PRECISION, workload.INPUTS
    ),
    "model": _of_models(models.MODEL_STEPS),
    "blocks": _of_models(models.BLOCKS_STEPS),
}
