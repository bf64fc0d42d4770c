"""The models that a cell can name: how each is built and called, and what a step gives it.

    Published     one of reference.PUBLISHED
    OfDiffusers   one of diffusers, by the configuration that its cell carries

Either has the dropout of the cell.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.records import Cell
from resblock_bench.reference import PUBLISHED, EDMBlock, ResBlock, UNetConfig, build
from resblock_bench.reference.torso import cast_convolutions

from . import diffusers_model
from .workload import DTYPES

NamedTensors = dict[str, Tensor]


class Network(Protocol):
    """A model.

    image      the input that is an image
    classes    what its class indices are below
    samples    whether a sampler goes on with what it returns
    rounded    whether it is given its image in the cell's dtype; else it converts it itself
    """

    @property
    def image(self) -> str: ...

    @property
    def classes(self) -> int: ...

    @property
    def samples(self) -> bool: ...

    @property
    def rounded(self) -> bool: ...

    def zero_inputs(self, batch: int) -> NamedTensors:
        """The arguments by name, and "target" for the loss; on the default device."""

    def build(self, cell: Cell) -> nn.Module:
        """The reference's, with the cell's dtype and with full checkpointing where it has that; on
        the default device."""

    def call(self, run: Callable[..., Any], inputs: NamedTensors) -> Tensor:
        """What `run`, which is called as the module is, makes of the inputs without the target."""

    def autocast(self, cell: Cell, device: torch.device) -> AbstractContextManager[Any]:
        """In which it runs."""

    def loss(self, out: Tensor, target: Tensor) -> Tensor: ...


def network_of(cell: Cell) -> Network:
    """The model of a cell. Raises InvalidError where there is none."""
    if cell.config is not None:
        return OfDiffusers(diffusers_model.checked(cell.config), cell.dropout)
    return Published(config_of(cell))


def config_of(cell: Cell) -> UNetConfig:
    """The published model of a cell, with the cell's dropout."""
    if cell.model is None or cell.model not in PUBLISHED:
        raise InvalidError(f"{cell.model} is no published model, and its cell has no configuration")
    return dataclasses.replace(PUBLISHED[cell.model], dropout=cell.dropout)


@dataclasses.dataclass(frozen=True)
class Published:
    """In 16 bits its blocks' convolutions and activations are in 16 bits, all else in float32; of
    EDM, whose networks have no such mode, all convolutions."""

    config: UNetConfig
    image = "x"

    @property
    def classes(self) -> int:
        encoder = self.config.family == "encoder"
        return self.config.out_channels if encoder else self.config.num_classes or 1

    @property
    def samples(self) -> bool:
        return self.config.family != "encoder"

    @property
    def rounded(self) -> bool:
        return self.config.family.startswith("edm")

    def zero_inputs(self, batch: int) -> NamedTensors:
        return zero_inputs(self.config, batch)

    def build(self, cell: Cell) -> nn.Module:
        short, full = cell.dtype != "fp32", cell.checkpoint == "full"
        model = build(self.config, use_checkpoint=full, use_fp16=short and not self.rounded)
        if short and self.rounded:
            cast_convolutions([model], torch.float16)
        return model

    def call(self, run: Callable[..., Any], inputs: NamedTensors) -> Tensor:
        out: Tensor = run(**inputs)
        return out

    def autocast(self, cell: Cell, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        return model_loss(self.config, out, target)


@dataclasses.dataclass(frozen=True)
class OfDiffusers:
    """In 16 bits it runs under autocast, all of its parameters in float32. Full checkpointing is
    diffusers' own."""

    config: diffusers_model.Config
    dropout: float
    image = "sample"
    samples = True
    rounded = False

    @property
    def classes(self) -> int:
        return self.config.get("num_class_embeds") or 1

    @cached_property
    def _fourier(self) -> bool:
        return self.config.get("time_embedding_type") == "fourier"

    def zero_inputs(self, batch: int) -> NamedTensors:
        return diffusers_model.draw_inputs(self.config, batch)

    def build(self, cell: Cell) -> nn.Module:
        config = {**self.config, "dropout": self.dropout}
        return diffusers_model.build_model(config, checkpoint=cell.checkpoint == "full")

    def call(self, run: Callable[..., Any], inputs: NamedTensors) -> Tensor:
        if self._fourier:  # takes its logarithm
            inputs = {**inputs, "timestep": inputs["timestep"].abs()}
        return diffusers_model.call(run, inputs)

    def autocast(self, cell: Cell, device: torch.device) -> AbstractContextManager[Any]:
        if cell.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device.type, DTYPES[cell.dtype])

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        return model_loss(None, out, target)


def zero_inputs(config: UNetConfig, batch: int) -> NamedTensors:
    """The arguments of a model by name, and "target" for its loss; on the default device."""
    size = (config.image_size, config.image_size)
    found = {
        "x": torch.zeros(batch, config.in_channels, *size),
        "timesteps": torch.zeros(batch),
    }
    if config.family == "super_res":
        found["low_res"] = torch.zeros(
            batch, config.in_channels, *(side // 4 or 1 for side in size)
        )
    if config.family == "encoder":
        found["target"] = torch.zeros(batch, dtype=torch.int64)
        return found
    if config.num_classes is not None:
        # EDM gives its classes as rows, one-hot but for classifier-free training.
        edm = config.family.startswith("edm")
        shape = (batch, config.num_classes) if edm else (batch,)
        found["y"] = torch.zeros(shape, dtype=torch.float32 if edm else torch.int64)
    if config.augment_dim:
        found["augment_labels"] = torch.zeros(batch, config.augment_dim)
    found["target"] = torch.zeros(batch, config.out_channels, *size)
    return found


def model_loss(config: UNetConfig | None, out: Tensor, target: Tensor) -> Tensor:
    """The mean squared error in at least float32; of a classifier the cross entropy."""
    if config is not None and config.family == "encoder":
        return F.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), target)
    # As IDDPM writes it. F.mse_loss keeps a storage of the images' size for its one number.
    return (out.to(target.dtype) - target).square().mean()


class BlockShapes(NamedTuple):
    """A residual block of a model, and what comes in and out of it for one image."""

    name: str
    x: tuple[int, ...]
    out: tuple[int, ...]


@cache
def block_shapes(config: UNetConfig) -> list[BlockShapes]:
    """The residual blocks of a model in the order they run."""
    found: list[BlockShapes] = []
    with unset_fake_temporarily(), torch.device("meta"):
        model, inputs = build(config), zero_inputs(config, 1)
        for name, module in model.named_modules():
            if isinstance(module, ResBlock | EDMBlock):

                def note(_: nn.Module, given: Any, out: Tensor, name: str = name) -> None:
                    found.append(BlockShapes(name, tuple(given[0].shape[1:]), tuple(out.shape[1:])))

                module.register_forward_hook(note)
        del inputs["target"]
        with torch.no_grad():
            model(**inputs)
    return found
