"""Steps of whole models made runnable, and of all residual blocks of a model.

A model is a published one or one of diffusers; networks.py says what its 16 bits are.

    train       loss, backward, AdamW, moving average: what makes an iteration of training, without
                data and without the exchange of gradients. Where parameters are in 16 bits, AdamW
                works on float32 masters of all of them, and float16 has its loss scaled
    inference   the network once, and the sampler's update: DDIM's from one noise level to the next.
                A sampler of K steps does that K times for an image; a classifier has no update

`blocks` are the residual blocks of a model with its weights, as often as they are there, one after
the other, on inputs of their own: all forward, then all backward, as in the model. Beside the
model's step that says which part of it the blocks are. EDM's blocks have their attention inside.
"""

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from resblock_bench.bench.records import Cell
from resblock_bench.reference import EDMBlock

from .implementations import IMPLEMENTATIONS
from .networks import NamedTensors, block_shapes, config_of, network_of
from .workload import DTYPES, Workload, formatted, nontrivial

LEARNING_RATE = 1e-4
EMA_SHARE = 1e-4
"""Of the weights in a step's moving average."""
_SIGNAL = (0.5, 0.6)
"""ᾱ of the noise level that a sampling step starts from, and of the next: any two serve."""

MODEL_PRECISION = (
    "convolutions and activations of blocks in dtype; norms, linears, embedding, loss, AdamW and "
    "moving average in float32; float16 with a scaled loss; of diffusers autocast to dtype"
)
MODEL_INPUTS = "standard normal; classes uniform"
MODEL_STEPS = {
    "inference": "out = model(x, t, …) in eval mode under no_grad, x of the next noise level",
    "forward": "out = model(x, t, …) in train mode, graph recorded",
    "train": (
        "gradients None; mean squared error, or a classifier's cross entropy, of model(x, t, …) "
        "in train mode; backward, by microbatches; fused AdamW; moving average of the weights"
    ),
}
BLOCKS_STEPS = {
    "inference": "out = block(x, emb) of all blocks in eval mode under no_grad",
    "forward": "out = block(x, emb) of all blocks in train mode, graph recorded",
    "train": (
        "out = block(x, emb) of all blocks in train mode, then backward of all with a cotangent "
        "each: gradients of every x, emb and all parameters, each None before the step"
    ),
}


class ResBlocks(nn.Module):
    """The residual blocks of a model, each on an input of its own."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.get_submodule(name) for name in names)

    def forward(self, emb: Tensor, *xs: Tensor) -> list[Tensor]:
        """emb: (N, E); of each block its x -> of each block its output."""
        return [block(x, emb) for block, x in zip(self.blocks, xs, strict=True)]


def draw_model_inputs(cell: Cell, device: torch.device, seed: int) -> NamedTensors:
    """The inputs of a step by name, the same for every implementation."""
    generator = torch.Generator(device).manual_seed(seed)
    network = network_of(cell)
    inputs = _zero_inputs(cell, device)
    for tensor in inputs.values():
        draw_(tensor, generator, network.classes)
    if cell.workload == "model":
        shape = cell if network.rounded else replace(cell, dtype="fp32")
        inputs[network.image] = formatted(inputs[network.image], shape)
        return inputs
    return {name: t if name == "emb" else formatted(t, cell) for name, t in inputs.items()}


def _zero_inputs(cell: Cell, device: torch.device) -> NamedTensors:
    with device:
        if cell.workload == "model":
            return network_of(cell).zero_inputs(cell.batch)
        config = config_of(cell)
        found = {"emb": torch.zeros(cell.batch, config.emb_channels)}
        for i, (_, x, out) in enumerate(block_shapes(config)):
            found[f"x {i}"] = torch.zeros(cell.batch, *x)
            found[f"cotangent {i}"] = torch.zeros(cell.batch, *out)
    return found


def draw_(tensor: Tensor, generator: torch.Generator, classes: int) -> None:
    if tensor.is_floating_point():
        tensor.normal_(generator=generator)
    else:
        tensor.random_(classes, generator=generator)


def draw_model_weights(cell: Cell, seed: int) -> NamedTensors:
    """A state dict in which nothing is trivial, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nontrivial(name, tensor.normal_(generator=generator))
        for name, tensor in empty_model_weights(cell).items()
    }


def empty_model_weights(cell: Cell) -> NamedTensors:
    """A state dict without values, in float32."""
    return {name: torch.empty(p.shape) for name, p in _module(cell).named_parameters()}


def _module(cell: Cell) -> nn.Module:
    """Of the reference, on the meta device: on fake tensors none can be converted to 16 bits."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = network_of(cell).build(cell)
        if cell.workload == "model":
            return model
        return ResBlocks(model, [shapes.name for shapes in block_shapes(config_of(cell))])


class ModelWorkload(Workload):
    """A model, its inputs and its step, ready to be run any number of times.

    exact   what the others are held against: all in float64, an image at a time, no weight changes
    """

    def __init__(
        self,
        cell: Cell,
        weights: NamedTensors,
        inputs: NamedTensors,
        device: torch.device,
        *,
        exact: bool = False,
    ) -> None:
        self.cell, self.mode, self.device = cell, cell.mode, device
        self._exact = exact
        self._network = network_of(cell)
        self.block = _module(cell)
        self._dtypes = {
            name: torch.float32 if t.dtype == torch.float32 else DTYPES[cell.dtype]
            for name, t in self.block.named_parameters()
        }
        self._implement(self._converted(weights))
        if exact:  # what is embedded comes in float32, whatever the model is in
            for module in self.block.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(_in_own_dtype)
        self.inputs = {name: self._begun(name, tensor) for name, tensor in inputs.items()}
        self._train()
        self._generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(0)
        self._places = random.Random(0)
        self._gaps = []

    def turn_into(self, cell: Cell) -> None:
        """Become another variant of the same site. Parameters, moments, average and inputs stay."""
        parameters: NamedTensors = dict(self.block.named_parameters())
        self.cell, self.block = cell, _module(cell)
        self._implement(parameters)

    def _implement(self, state: NamedTensors) -> None:
        """Make the block the implementation's, with these tensors as its parameters."""
        implementation = IMPLEMENTATIONS[self.cell.impl]
        assert implementation.model is not None
        with unset_fake_temporarily():
            self._run = implementation.model(self.block, self.cell.checkpoint)
        # Assigned, since fake parameters cannot be converted in place.
        self.block.load_state_dict(state, assign=True)
        self.block.train(self.mode != "inference")

    def _converted(self, weights: NamedTensors) -> NamedTensors:
        """Copies of the weights, in the dtypes and the layout that the model keeps them in."""
        found = {}
        for name, weight in weights.items():
            own = weight.to(self.device, self._dtypes[name], copy=True)
            if self.cell.layout == "nhwc" and own.ndim == 4:
                own = own.contiguous(memory_format=torch.channels_last)
            found[name] = own.double() if self._exact else own
        return found

    def _begun(self, name: str, tensor: Tensor) -> Tensor:
        """An input as the step takes it; those of blocks have a gradient, those of models none."""
        if self._exact and tensor.is_floating_point():
            tensor = tensor.double()
        tensor = tensor.detach()
        differentiated = name == "emb" or name.startswith("x ")
        return tensor.requires_grad_(differentiated and self.mode != "inference")

    def _train(self) -> None:
        """What a training step of a model has besides: masters, AdamW's states, the average."""
        own = _parameters(self.block)
        self._masters: list[Tensor] = []
        self._average: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._trained = own
        self._scale = 1.0
        if self._exact or self.mode != "train" or self.cell.workload != "model":
            return
        if any(p.dtype != torch.float32 for p in own.values()):
            self._masters = [_single(p).requires_grad_() for p in own.values()]
            self._trained = dict(zip(own, self._masters, strict=True))
        if self.cell.dtype == "fp16":
            # A mean over many numbers has gradients that float16 takes for zero.
            elements = max(self.inputs["target"][0].numel(), self._network.classes)
            self._scale = 2.0 ** round(math.log2(elements))
        trained = list(self._trained.values())
        self._average = [_single(p) for p in trained]
        # IDDPM's: no decay. Capturable, so that a CUDA graph can hold it.
        capturable = self.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True, capturable=capturable
        )
        for p in trained:
            p.grad = torch.zeros_like(p)
        self._optimizer.step()  # makes its states, and with gradients of zero changes nothing
        self.reset()

    def reset(self) -> None:
        super().reset()
        for master in self._masters:
            master.grad = None

    def leaves(self) -> NamedTensors:
        """What a training step differentiates by: every parameter; of blocks also emb and all x."""
        differentiated = {name: t for name, t in self.inputs.items() if t.requires_grad}
        return {**differentiated, **_parameters(self.block)}

    def resident(self) -> list[Tensor]:
        found = [*super().resident(), *self._masters, *self._average]
        if self._optimizer is not None:
            for states in self._optimizer.state.values():
                found += states.values()
        return found

    def graph(self) -> object:
        # Copies, so that they die with the last reference unless the graph keeps them.
        part = {name: tensor.clone() for name, tensor in next(self._parts()).items()}
        if self.cell.workload == "blocks":
            return [out.grad_fn for out in self._outputs(part)]
        (out,) = self._outputs(part)
        return self._network.loss(out, part["target"]).grad_fn

    @contextmanager
    def as_checked(self, weights: NamedTensors) -> Iterator["ModelWorkload"]:
        """Itself with these weights, and meanwhile without dropout: its steps change the weights,
        and a second model might not fit."""
        state = self.block.state_dict()
        with torch.no_grad():
            for name, weight in self._converted(weights).items():
                state[name].copy_(weight)
            for master, p in zip(self._masters, self.block.parameters(), strict=False):
                master.copy_(p)
        with self._without_dropout():
            yield self

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        names = {nn.Dropout: "p", EDMBlock: "dropout"}
        before = [
            (module, name, getattr(module, name))
            for module in self.block.modules()
            for kind, name in names.items()
            if isinstance(module, kind)
        ]
        for module, name, _ in before:
            setattr(module, name, 0.0)
        try:
            yield
        finally:
            for module, name, p in before:
                setattr(module, name, p)

    def refill(self, inputs: NamedTensors) -> None:
        """These inputs in the same memory."""
        with torch.no_grad():
            for name, tensor in self.inputs.items():
                tensor.copy_(inputs[name])

    def step(self) -> list[NamedTensors]:
        """One step of the cell's mode; what it contains is in MODEL_STEPS and BLOCKS_STEPS.

        Returns the results of each pass, without gradients.
        """
        with torch.set_grad_enabled(self.mode != "inference"):
            found = [self._pass(part) for part in self._parts()]
        if self._optimizer is not None:
            self._update(self._optimizer)
        return found

    def results(self, *, copied: bool = False) -> NamedTensors:
        """One step's outputs, or a model's loss, and in train mode its gradients as 'grad NAME'."""
        self.reset()
        passes = self.step()
        if self.mode == "forward" and not all(t.requires_grad for t in passes[0].values()):
            raise RuntimeError("the forward pass recorded no graph to go back through")
        found: NamedTensors = {}
        for name in passes[0]:
            pieces = [one[name].detach() for one in passes]
            found[name] = torch.stack(pieces).sum() if name == "loss" else torch.cat(pieces)
        del passes
        if self.mode == "train":
            for name, leaf in {**self.leaves(), **self._trained}.items():
                if leaf.grad is None:
                    raise RuntimeError(f"the backward pass left no gradient for {name}")
                found[f"grad {name}"] = leaf.grad
        if copied:
            found = {name: result.clone() for name, result in found.items()}
        self.reset()
        return found

    def _inputs(self) -> Iterable[Tensor]:
        return self.inputs.values()

    def _draw(self, tensor: Tensor) -> None:
        draw_(tensor, self._generator, self._network.classes)

    def _parts(self) -> Iterator[NamedTensors]:
        """What each pass of a step takes."""
        size = 1 if self._exact else self.cell.microbatch or self.cell.batch
        if size >= self.cell.batch:
            yield self.inputs
            return
        for start in range(0, self.cell.batch, size):
            yield {name: tensor[start : start + size] for name, tensor in self.inputs.items()}

    def _outputs(self, part: NamedTensors) -> list[Tensor]:
        if self.cell.workload == "model":
            given = {name: t for name, t in part.items() if name != "target"}
            with self._autocast():
                return [self._network.call(self._run, given)]
        xs = [tensor for name, tensor in part.items() if name.startswith("x ")]
        outs: list[Tensor] = self._run(part["emb"], *xs)
        return outs

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._exact else self._network.autocast(self.cell, self.device)

    def _pass(self, part: NamedTensors) -> NamedTensors:
        outs = self._outputs(part)
        if self.cell.workload == "blocks":
            if self.mode == "train":
                names = (f"cotangent {i}" for i in range(len(outs)))
                torch.autograd.backward(outs, [part[name] for name in names])
                outs = [out.detach() for out in outs]
            return {f"out {i}": out for i, out in enumerate(outs)}
        (out,) = outs
        if self.mode == "train":
            loss = self._network.loss(out, part["target"])
            share = len(part["target"]) / self.cell.batch
            torch.autograd.backward(loss * (share * self._scale))
            return {"loss": loss.detach() * share}
        if self.mode == "forward" or not self._network.samples:
            return {"out": out}
        return {"out": out, "next": _sampled(part[self._network.image], out)}

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        parameters, trained = (list(t.values()) for t in (_parameters(self.block), self._trained))
        for p, master in zip(parameters, self._masters, strict=False):
            assert p.grad is not None
            master.grad = p.grad.float()
        if self._scale != 1.0:
            torch._foreach_mul_([_gradient(p) for p in trained], 1 / self._scale)
        optimizer.step()
        with torch.no_grad():
            if self._masters:
                torch._foreach_copy_(parameters, self._masters)
            torch._foreach_lerp_(self._average, trained, EMA_SHARE)


def _parameters(module: nn.Module) -> NamedTensors:
    """Those that are trained."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _in_own_dtype(linear: nn.Linear, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(linear.weight.dtype) for tensor in given)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _single(tensor: Tensor) -> Tensor:
    """In float32, and never the tensor itself."""
    return tensor.detach().to(torch.float32, copy=True)


def _sampled(x: Tensor, out: Tensor) -> Tensor:
    """DDIM: x at the next noise level, from the noise that the first channels of `out` predict.

    Where fewer come out than go in, those behind are a condition."""
    channels = min(x.shape[1], out.shape[1])
    x, noise = x[:, :channels], out[:, :channels].to(x.dtype)
    signal, later = _SIGNAL
    image = (x - math.sqrt(1 - signal) * noise) / math.sqrt(signal)
    return math.sqrt(later) * image + math.sqrt(1 - later) * noise


def least_model_work(cell: Cell) -> tuple[int, int]:
    """Bytes and operations that a step cannot do without; they follow from the sizes.

    A model in training reads and writes float32 weights, two moments and the moving average.
    """
    from torch.utils.flop_counter import FlopCounterMode  # 70 MB

    meta = torch.device("meta")
    single = replace(
        cell, batch=1, microbatch=None, impl="reference", checkpoint="none", dropout=0.0
    )
    with unset_fake_temporarily():
        weights: NamedTensors = dict(_module(single).named_parameters())
        one = ModelWorkload(single, weights, _zero_inputs(single, meta), meta, exact=True)
        with FlopCounterMode(display=False) as counter:
            (results,) = one.step()
    training, size = cell.mode == "train", DTYPES[cell.dtype].itemsize
    kept = sum(t.numel() * one._dtypes[name].itemsize for name, t in weights.items())
    if cell.workload == "model":
        given = one.inputs[one._network.image]
        image = 0 if training else size * (given.numel() + _numbers(results)[-1])
        moved = 4 * 2 * 4 * sum(_numbers(one._trained)) if training else kept
    else:
        xs = [t for name, t in one.inputs.items() if not name.startswith("cotangent")]
        image = size * (sum(t.numel() for t in xs) + sum(_numbers(results)))
        image, moved = (2 * image, 2 * kept) if training else (image, kept)
    return moved + cell.batch * image, cell.batch * counter.get_total_flops()


def _numbers(tensors: NamedTensors) -> list[int]:
    return [tensor.numel() for tensor in tensors.values()]
