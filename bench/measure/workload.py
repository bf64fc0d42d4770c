"""One cell made runnable: the block with its weights, its inputs, and the step that is measured.

Every implementation of a site gets the same weights and the same inputs, drawn from the seed.
16-bit cells follow the published recipe: convolutions and activations in 16 bits; norms, linears
and the embedding in float32.
"""

import ctypes
import math
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from resblock_bench.bench.records import Cell
from resblock_bench.reference import ResBlock
from resblock_bench.reference.layers import GROUPS

from . import diffusers_model
from .implementations import IMPLEMENTATIONS, BlockCall, block_arguments, refusal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_GAPS = 8
"""Buffers that lie between what a step allocates, of all sizes up to a mebibyte."""
_HELD_BYTES = 16 * 2**20
"""The most that is held besides, written to: a system hands out the pages that it got back last."""

PRECISION = "convolutions and activations in dtype; norms, linears and embedding in float32"
INPUTS = "standard normal"
STEPS = {
    "inference": "out = block(x, emb) in eval mode under no_grad",
    "forward": "out = block(x, emb) in train mode, graph recorded",
    "train": (
        "out = block(x, emb) in train mode, then out.backward(cotangent): gradients of x, emb and "
        "all parameters, each None before the step"
    ),
}


def checked_cell(cell: Cell) -> Cell:
    """The cell as it is checked: without dropout, whose masks differ between implementations."""
    plain: Cell = replace(cell, dropout=0.0)
    return plain


def unsupported(cell: Cell) -> str | None:
    """Why there is no such cell in PyTorch, or of its implementation; or None."""
    if cell.workload != "block":
        offered = IMPLEMENTATIONS.get(cell.impl)
        if offered is not None and offered.model is None:
            return f"{cell.impl} offers a block and no whole models: measure it with workload=block"
        return None if cell.config is None else diffusers_model.missing()
    if cell.layout == "nhwc" and cell.dims == 1:
        return "PyTorch has no channels-last layout for one spatial dimension"
    if any(cell.batch * channels * size <= GROUPS for channels, size in norm_shapes(cell)):
        return "PyTorch refuses a norm over a single value: a larger batch, resolution or channels"
    return refusal(cell)


@dataclass
class Inputs:
    """x: (N, C_in, *S) in the cell's dtype and layout; emb: (N, E) float32; cotangent like out."""

    x: Tensor
    emb: Tensor
    cotangent: Tensor


def draw_inputs(cell: Cell, device: torch.device, seed: int) -> Inputs:
    """The inputs of a site, the same for every implementation."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spatial = (cell.resolution,) * cell.dims
    x = normal(cell.batch, cell.channels, *spatial)
    emb = normal(cell.batch, cell.emb_channels)
    cotangent = normal(cell.batch, cell.out_channels, *_output_size(cell))
    return Inputs(formatted(x, cell), emb, formatted(cotangent, cell))


def _output_size(cell: Cell) -> tuple[int, ...]:
    size = cell.resolution
    resampled = {"none": size, "up": 2 * size, "down": size // 2}[cell.updown]
    kept = (size,) if cell.dims == 3 else ()  # in 3D the outermost size is never resampled
    return kept + (resampled,) * (cell.dims - len(kept))


def norm_shapes(cell: Cell) -> tuple[tuple[int, int], tuple[int, int]]:
    """Channels and positions of a block's norms: over its input, and over what its first
    convolution returns."""
    positions = cell.resolution**cell.dims
    return (cell.channels, positions), (cell.out_channels, math.prod(_output_size(cell)))


def formatted(tensor: Tensor, cell: Cell) -> Tensor:
    """In the cell's dtype; images and kernels also in its layout, which a bias does not have."""
    tensor = tensor.to(DTYPES[cell.dtype])
    if cell.layout == "nhwc" and tensor.ndim == cell.dims + 2:
        return tensor.contiguous(memory_format=_CHANNELS_LAST[cell.dims])
    return tensor


def draw_weights(cell: Cell, seed: int) -> dict[str, Tensor]:
    """A state dict in which nothing is trivial.

    A fresh block ends in a zeroed convolution and starts with identity norms, so every
    implementation would agree; here convolutions and linears are normal with standard deviation
    1/√fan_in, norms are 1 + 0.1·normal and biases 0.1·normal.
    """
    generator = torch.Generator().manual_seed(seed)
    state = ResBlock(**block_arguments(cell)).state_dict()
    return {
        name: nontrivial(name, torch.randn(tensor.shape, generator=generator))
        for name, tensor in state.items()
    }


def nontrivial(name: str, normal: Tensor) -> Tensor:
    """A weight of this name, from a normal tensor of its shape; see `draw_weights`."""
    if normal.ndim > 1:
        return normal.div(normal[0].numel() ** 0.5)
    return 0.1 * normal + float(name.endswith("weight"))


def _converted(
    weights: dict[str, Tensor], block: nn.Module, cell: Cell, device: torch.device
) -> dict[str, Tensor]:
    """The weights on the device, those of convolutions in the cell's dtype and layout."""
    convolutions = {
        f"{prefix}.{name}"
        for prefix, module in block.named_modules()
        if isinstance(module, _CONVOLUTIONS)
        for name, _ in module.named_parameters(recurse=False)
    }
    return {
        name: (formatted(tensor, cell) if name in convolutions else tensor).to(device)
        for name, tensor in weights.items()
    }


class Workload:
    """A block, its inputs and its step, ready to be run any number of times."""

    def __init__(
        self, cell: Cell, weights: dict[str, Tensor], inputs: Inputs, device: torch.device
    ) -> None:
        implementation = IMPLEMENTATIONS[cell.impl]
        self.cell, self.mode, self.device = cell, cell.mode, device
        block = implementation.build(cell)
        # Assigned, not copied: fake parameters cannot be converted in place.
        block.load_state_dict(_converted(weights, block, cell, device), assign=True)
        block.train(cell.mode != "inference")
        self.block = block
        self.call: BlockCall = implementation.wrap(block, cell)
        self.x = inputs.x.detach().requires_grad_(cell.mode != "inference")
        self.emb = inputs.emb.detach().requires_grad_(cell.mode != "inference")
        self.cotangent = inputs.cotangent
        self._generator = torch.Generator(device).manual_seed(0)
        self._places = random.Random(0)
        self._gaps: list[Tensor] = []

    def reset(self) -> None:
        """Drop all gradients, as the contract has them before a step."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def freshen(self) -> None:
        """`reset`, and draw a number of each input anew: no result of before, nor a part of one,
        is right for what comes now."""
        self.reset()
        with torch.no_grad():
            for tensor in self._inputs():
                self._draw(tensor[(0,) * tensor.ndim])

    def redraw(self) -> None:
        """Other inputs; on a CPU, other places in memory for all that a step touches.

        Where its buffers happen to lie made a step of the same code a tenth slower for as long as
        its process lived: what is drawn by lot has to be drawn anew.
        """
        if self.device.type == "cpu":
            self._move()
        with torch.no_grad():
            for tensor in self._inputs():
                self._draw(tensor)

    def _draw(self, tensor: Tensor) -> None:
        tensor.normal_(generator=self._generator)

    def _move(self) -> None:
        self._gaps.clear()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what is free gets other pages when it is used again
        gaps = self._places
        self._gaps += [torch.empty(int(2 ** gaps.uniform(4, 18))) for _ in range(_GAPS)]
        self._gaps.append(torch.ones(int(gaps.uniform(0, _HELD_BYTES / 4))))
        for tensor in self.resident():
            tensor.data = tensor.data.clone()
            self._gaps.append(torch.empty(int(2 ** gaps.uniform(4, 12))))

    def _inputs(self) -> Iterable[Tensor]:
        return self.x, self.emb, self.cotangent

    def resident(self) -> list[Tensor]:
        """What is alive before a step."""
        return [*self.block.parameters(), *self.block.buffers(), *self._inputs()]

    def graph(self) -> object:
        """The graph of a forward pass; no backward pass runs, so no gradient is left behind."""
        # Copies, so that they die with the last reference unless the graph keeps them.
        return self.call(self.x.clone(), self.emb.clone()).grad_fn

    @contextmanager
    def as_checked(self, weights: dict[str, Tensor]) -> Iterator["Workload"]:
        """The same with these weights, and without dropout, whose masks differ between
        implementations. It shares the inputs' memory."""
        if self.cell.dropout:
            inputs = Inputs(self.x, self.emb, self.cotangent)
            yield Workload(checked_cell(self.cell), weights, inputs, self.device)
        else:
            yield self

    def refill(self, inputs: Any) -> None:
        """These inputs in the same memory."""
        with torch.no_grad():
            self.x.copy_(inputs.x)
            self.emb.copy_(inputs.emb)
            self.cotangent.copy_(inputs.cotangent)

    def step(self) -> Any:
        """One step of the cell's mode; what it contains is in STEPS."""
        if self.mode == "inference":
            with torch.no_grad():
                return self.call(self.x, self.emb)
        out = self.call(self.x, self.emb)
        if self.mode == "train":
            torch.autograd.backward(out, self.cotangent)
        return out

    def leaves(self) -> dict[str, Tensor]:
        """What a training step differentiates by: x, emb and every parameter."""
        return {"x": self.x, "emb": self.emb, **dict(self.block.named_parameters())}

    def results(self, *, copied: bool = False) -> dict[str, Tensor]:
        """One step's output and, in train mode, its gradients as 'grad NAME'.

        copied   as they are when the step returns, whatever is still being written to them
        """
        self.reset()
        out = self.step()
        if self.mode == "forward" and not out.requires_grad:
            raise RuntimeError("the forward pass recorded no graph to go back through")
        results = {"out": out.detach()}
        del out
        if self.mode == "train":
            for name, leaf in self.leaves().items():
                if leaf.grad is None:
                    raise RuntimeError(f"the backward pass left no gradient for {name}")
                results[f"grad {name}"] = leaf.grad
        if copied:
            results = {name: result.clone() for name, result in results.items()}
        self.reset()
        return results
