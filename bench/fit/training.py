"""A training step: forward, loss, backward, AdamW, moving average, with all that lives between.

Gradients are None before a step. Precisions:

    fp32   everything in float32
    bf16   autocast to bfloat16 over float32 parameters, whose 16-bit copies autocast keeps until
           the backward is done; norms and upsampling in float32, as CUDA has it
    fp16   the mode of IDDPM and ADM: convolutions and activations in float16, AdamW on float32
           masters of all parameters. EDM and diffusers, which have no such mode, take autocast to
           float16

AdamW is the fused one: no temporaries. The loss is the mean squared error in float32, of a
classifier the cross entropy; of an autoencoder the divergence of its posterior is added.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from msgspec import Struct, structs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from resblock_bench.bench.measure import diffusers_model, workload
from resblock_bench.bench.measure.implementations import (
    IMPLEMENTATIONS,
    keep_convolutions_in_blocks,
)
from resblock_bench.bench.measure.networks import NamedTensors, model_loss, zero_inputs
from resblock_bench.bench.measure.workload import DTYPES
from resblock_bench.bench.records import Cell, Checkpoint
from resblock_bench.kernels import fuse_
from resblock_bench.reference import AttentionBlock, UNetConfig, build
from resblock_bench.reference.torso import cast_convolutions

from .cuda_autocast import cuda_autocast
from .lifetimes import Lifetimes
from .subject import Subject

Precision = Literal["fp32", "bf16", "fp16"]
Impl = Literal["reference", "fused"]
Optimizer = Literal["adamw", "none"]

_DIVERGENCE_WEIGHT = 1e-6
"""Of an autoencoder's posterior in its loss, as latent diffusion trains its own."""


class Recipe(Struct, frozen=True, kw_only=True):
    """How a subject is trained.

    recompute_attention   in the backward, as ADM's code does in every mode, and "full" in any case
    accumulate            over a second pass through the model, as with microbatches
    """

    impl: Impl
    checkpoint: Checkpoint
    precision: Precision
    optimizer: Optimizer = "adamw"
    ema: bool = False
    recompute_attention: bool = False
    accumulate: bool = False


class Training:
    """A model in training; all tensors are zeros.

    Real where it is made and run as it is, fake within a FakeTensorMode. `note` says what was fused
    of a model that is not of this suite, None of others.
    """

    def __init__(self, subject: Subject, recipe: Recipe) -> None:
        self.subject, self.recipe = subject, recipe
        # On fake tensors a model cannot be converted to float16; on meta tensors it can.
        with unset_fake_temporarily(), torch.device("meta"):
            self.model, self.note = _model(subject, recipe)
            shapes = {name: (t.shape, t.dtype) for name, t in self.model.state_dict().items()}
        # Assigned, since fake parameters cannot be converted in place.
        state = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        self.model.load_state_dict(state, assign=True)
        self.parameters = list(self.model.parameters())
        self.masters: list[Tensor] = []
        if recipe.optimizer != "none" and any(p.dtype != torch.float32 for p in self.parameters):
            self.masters = [_copy(p).requires_grad_() for p in self.parameters]
        self._trained = self.masters or self.parameters
        self.ema = [_copy(p) for p in self._trained] if recipe.ema else []
        self.optimizer: torch.optim.Optimizer | None = None
        if recipe.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self._trained, fused=True)
            for p in self._trained:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()  # makes its states
            self._forget()

    def watch(self, batch: int) -> Lifetimes:
        """One step of so many images, or with `accumulate` two passes of as many."""
        gc.collect()
        inputs = self._inputs(batch)
        watch = Lifetimes(self.model)
        watch.label("parameters", *self.parameters, *self.model.buffers())
        watch.label("masters", *self.masters)
        if self.optimizer is not None:
            states = (state.values() for state in self.optimizer.state.values())
            watch.label("optimizer", *(t for values in states for t in values))
        watch.label("ema", *self.ema)
        watch.label("inputs", *inputs.values())
        with watch, self._as_on_cuda():
            for _ in range(2 if self.recipe.accumulate else 1):
                with self._autocast(), watch.phase("forward"):
                    loss = self._loss(inputs)
                with watch.phase("backward"):
                    torch.autograd.backward(loss)
                watch.label("gradients", *_gradients(self.parameters))
                del loss
            with watch.phase("optimizer"):
                self._optimise(watch)
            with watch.phase("ema"), torch.no_grad():
                for average, p in zip(self.ema, self._trained, strict=False):
                    average.mul_(0.9999).add_(p, alpha=0.0001)
        self._forget()
        return watch

    def _optimise(self, watch: Lifetimes) -> None:
        if self.optimizer is None:
            return
        for p, master in zip(self.parameters, self.masters, strict=False):
            assert p.grad is not None
            master.grad = _copy(p.grad)
        watch.label("gradients", *_gradients(self.masters))
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=False):
                master.grad = None
                p.copy_(master)

    def _forget(self) -> None:
        for p in (*self.parameters, *self.masters):
            p.grad = None

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = autocast_dtype(self.subject, self.recipe.precision)
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def _as_on_cuda(self) -> AbstractContextManager[Any]:
        """With autocast, in float32 what CUDA's computes in it. EDM's own code has fp16 without
        autocast, and computes all of it in 16 bits."""
        dtype = autocast_dtype(self.subject, self.recipe.precision)
        edm = self.subject.config is not None and self.recipe.precision == "fp16"
        return nullcontext() if dtype is None or edm else cuda_autocast()

    def _inputs(self, batch: int) -> NamedTensors:
        if self.subject.config is not None:
            return zero_inputs(self.subject.config, batch)
        if self.subject.diffusers is not None:
            return diffusers_model.draw_inputs(self.subject.diffusers, batch)
        return _block_inputs(self.subject, batch, self.recipe.precision)

    def _loss(self, inputs: NamedTensors) -> Tensor:
        arguments = {name: tensor for name, tensor in inputs.items() if name != "target"}
        config, divergence = self.subject.diffusers, None
        if config is None:
            out = self.model(**arguments)
        elif config["_class_name"] == "AutoencoderKL":
            out, divergence = diffusers_model.autoencoded(self.model, arguments["sample"])
        else:
            out = diffusers_model.call(self.model, arguments)
        loss = model_loss(self.subject.config, out, inputs["target"])
        return loss if divergence is None else loss + _DIVERGENCE_WEIGHT * divergence


def published_precision(config: UNetConfig) -> Precision:
    """In which a published model was trained."""
    return "fp16" if config.trained_in_fp16 else "fp32"


def autocast_dtype(subject: Subject, precision: Precision) -> torch.dtype | None:
    """What autocast casts to, or None without it."""
    config = subject.config
    own_fp16 = subject.cell is not None or (
        config is not None and not config.family.startswith("edm")
    )
    casts = precision == "bf16" or (precision == "fp16" and not own_fp16)
    return DTYPES[precision] if casts else None


def _model(subject: Subject, recipe: Recipe) -> tuple[nn.Module, str | None]:
    """The model, and what is to be said of fusing it."""
    if subject.diffusers is not None:
        return _diffusers_model(subject.diffusers, recipe)
    in_fp16 = recipe.precision == "fp16" and autocast_dtype(subject, recipe.precision) is None
    if subject.config is not None:
        model = build(subject.config, use_checkpoint=recipe.checkpoint == "full", use_fp16=in_fp16)
        offered = IMPLEMENTATIONS[recipe.impl].model
        assert offered is not None
        offered(model, recipe.checkpoint)
    else:
        cell = _cell_of(subject, impl=recipe.impl, checkpoint=recipe.checkpoint)
        model = IMPLEMENTATIONS[recipe.impl].build(cell)
        if in_fp16:
            cast_convolutions([model], torch.float16)
        if recipe.impl == "reference" and recipe.checkpoint == "selective":
            keep_convolutions_in_blocks(model)
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.use_checkpoint |= recipe.recompute_attention
    return model, None


def _diffusers_model(
    config: diffusers_model.Config, recipe: Recipe
) -> tuple[nn.Module, str | None]:
    """With "full" as diffusers checkpoints it, fused or not: whole blocks of the model."""
    model = diffusers_model.build_model(config, checkpoint=recipe.checkpoint == "full")
    if recipe.impl == "fused":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said by the note
            report = fuse_(model, "selective" if recipe.checkpoint == "selective" else None)
        if not report.fused:
            return model, "nothing was fused, so this is the reference"
        kinds = Counter(what.partition(",")[0] for what in report.fused.values())
        fused = ", ".join(f"{count} {what}" for what, count in kinds.items())
        return model, f"it has {fused}; {len(report.left)} modules were left as they are"
    if recipe.checkpoint == "selective":
        keep_convolutions_in_blocks(model)
    return model, None


def _block_inputs(subject: Subject, batch: int, precision: Precision) -> NamedTensors:
    drawn = workload.draw_inputs(
        _cell_of(subject, batch=batch, dtype=precision), torch.device("cpu"), seed=0
    )
    x, emb = drawn.x.requires_grad_(), drawn.emb.requires_grad_()
    return {"x": x, "emb": emb, "target": drawn.cotangent.float()}


def _cell_of(subject: Subject, **changes: Any) -> Cell:
    assert subject.cell is not None
    return structs.replace(subject.cell, **changes)


def _copy(tensor: Tensor) -> Tensor:
    """In float32, and never the tensor itself."""
    return tensor.detach().to(torch.float32, copy=True)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
