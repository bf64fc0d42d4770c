"""The implementations that a cell can name, each in every checkpoint mode.

An installed package adds its own by the entry point group `resblock_bench.implementations`: the
name is what a cell names, the object an `Implementation`.

What a mode keeps for the backward pass, for every implementation:

    none        whatever autograd saves
    selective   the outputs of convolutions; everything between them is recomputed
    full        the block's inputs; all of it is recomputed

so that each mode of the fused block has a peer that makes the same trade.
"""

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

from resblock_bench.bench.records import Cell, Checkpoint
from resblock_bench.reference import EDMBlock
from resblock_bench.reference import ResBlock as ReferenceResBlock

from . import diffusers_model
from .peers import EVERYTHING, PEERS, Ability, DeclinedError, Peer

BlockCall = Callable[[Tensor, Tensor], Tensor]
"""(x, emb) -> out."""
ModelCall = Callable[..., Any]
"""As the module is called."""


@dataclass(frozen=True)
class Implementation:
    """One way to run a block.

    build(cell)         the module that holds the weights, with reference.ResBlock's state dict
    wrap(module, cell)  the callable that a step calls; the module itself unless something wraps it
    unusable(device)    why it cannot run on "cpu" or "cuda" here, or None
    can                 which cells it is made for
    compiles            torch.compile is in it
    model(module, mode) makes a module's reference blocks its own, in place, and returns what a step
                        calls; None where it offers a block alone. They are built with full
                        checkpointing where that is the mode
    """

    description: str
    build: Callable[[Cell], nn.Module]
    wrap: Callable[[nn.Module, Cell], BlockCall]
    unusable: Callable[[str], str | None]
    can: Ability = EVERYTHING
    compiles: bool = False
    model: Callable[[nn.Module, Checkpoint], ModelCall] | None = None


def block_arguments(cell: Cell) -> dict[str, Any]:
    """The constructor arguments of reference.ResBlock for a cell's block."""
    return {
        "channels": cell.channels,
        "emb_channels": cell.emb_channels,
        "dropout": cell.dropout,
        "out_channels": cell.out_channels,
        "use_scale_shift_norm": cell.conditioning == "scale_shift",
        "dims": cell.dims,
        "up": cell.updown == "up",
        "down": cell.updown == "down",
    }


def _build_reference(cell: Cell) -> nn.Module:
    return ReferenceResBlock(**block_arguments(cell), use_checkpoint=cell.checkpoint == "full")


def _build_fused(cell: Cell) -> nn.Module:
    # Here and not above: Triton is 70 MB that only the process of a cell needs.
    from resblock_bench.kernels import ResBlock as FusedResBlock

    block: nn.Module = FusedResBlock(**block_arguments(cell), checkpoint=cell.checkpoint)
    return block


def _as_it_is(module: nn.Module, cell: Cell) -> BlockCall:
    return module


def _keep_convolutions(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    policy = torch_checkpoint.CheckpointPolicy
    if op is torch.ops.aten.convolution.default:
        return policy.MUST_SAVE
    return policy.PREFER_RECOMPUTE


def keeping_convolutions(call: BlockCall) -> BlockCall:
    """The call with selective checkpointing: it keeps what convolutions return."""
    contexts = functools.partial(
        torch_checkpoint.create_selective_checkpoint_contexts, _keep_convolutions
    )

    def checkpointed(*given: Any, **named: Any) -> Tensor:
        out: Tensor = torch_checkpoint.checkpoint(
            call, *given, use_reentrant=False, context_fn=contexts, **named
        )
        return out

    return checkpointed


def _wrap_reference(module: nn.Module, cell: Cell) -> BlockCall:
    return keeping_convolutions(module) if cell.checkpoint == "selective" else module


def _wrap_compiled(module: nn.Module, cell: Cell, mode: str | None = None) -> BlockCall:
    return _compiled(_wrap_reference(module, cell), mode)


def _compiled(call: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # Without a reset a sweep runs into dynamo's limit of recompilations and silently goes eager.
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False, mode=mode)


def keep_convolutions_in_blocks(module: nn.Module) -> None:
    """Selective checkpointing of every residual block in a module, diffusers' ResnetBlock2D among
    them."""
    for block in module.modules():
        of_diffusers = type(block).__module__.startswith("diffusers.")
        ours = isinstance(block, ReferenceResBlock | EDMBlock)
        if ours or (of_diffusers and type(block).__name__ == "ResnetBlock2D"):
            vars(block)["forward"] = keeping_convolutions(block.forward)


def _reference_model(module: nn.Module, checkpoint: Checkpoint) -> ModelCall:
    if checkpoint == "selective":
        keep_convolutions_in_blocks(module)
    return module


def _compiled_model(
    module: nn.Module, checkpoint: Checkpoint, mode: str | None = None
) -> ModelCall:
    return _compiled(_reference_model(module, checkpoint), mode)


def _fused_model(module: nn.Module, checkpoint: Checkpoint) -> ModelCall:
    from resblock_bench.kernels import fuse_

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said by the reason
        report = fuse_(module, "selective" if checkpoint == "selective" else None)
    if not report.fused:
        raise DeclinedError("fuse_ finds nothing to fuse in it: fused would be the reference")
    return module


def _always_usable(device: str) -> None:
    return None


def _compiler_missing(device: str) -> str | None:
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU: install triton"
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["g++", "clang++", "c++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        return f"torch.compile needs a C++ compiler: none of {', '.join(candidates)} was found"
    return None


def _of_peer(peer: Peer) -> Implementation:
    """A peer's block; it is checkpointed as the reference is."""

    def build(cell: Cell) -> nn.Module:
        return peer.build({**block_arguments(cell), "use_checkpoint": cell.checkpoint == "full"})

    def unusable(device: str) -> str | None:
        if device not in peer.can.devices:
            return peer.missing() or f"it runs on {' and '.join(peer.can.devices)} only"
        return peer.missing()

    return Implementation(peer.description, build, _wrap_reference, unusable, peer.can)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(
        "plain PyTorch, operator by operator",
        _build_reference,
        _wrap_reference,
        _always_usable,
        model=_reference_model,
    ),
    "compiled": Implementation(
        "the reference under torch.compile",
        _build_reference,
        _wrap_compiled,
        _compiler_missing,
        compiles=True,
        model=_compiled_model,
    ),
    "compiled-max-autotune": Implementation(
        'the same with mode="max-autotune"',
        _build_reference,
        functools.partial(_wrap_compiled, mode="max-autotune"),
        _compiler_missing,
        compiles=True,
        model=functools.partial(_compiled_model, mode="max-autotune"),
    ),
    "fused": Implementation(
        "this project's fused block", _build_fused, _as_it_is, _always_usable, model=_fused_model
    ),
    **{name: _of_peer(peer) for name, peer in PEERS.items()},
}


def _offered(point: metadata.EntryPoint) -> Implementation:
    """An implementation of another package, which is not imported before a cell needs it."""

    @functools.cache
    def loaded() -> Implementation:
        found = point.load()
        if not isinstance(found, Implementation):
            raise TypeError(f"{point.value} is a {type(found).__name__}, not an Implementation")
        return found

    def unusable(device: str) -> str | None:
        try:
            return loaded().unusable(device)
        except (Exception, SystemExit) as error:  # whatever a foreign import raises
            return f"its package cannot be used ({type(error).__name__}: {error}): mend it"

    def build(cell: Cell) -> nn.Module:
        why = loaded().can.refusal(cell)
        if why is not None:
            raise DeclinedError(why)
        return loaded().build(cell)

    package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
    return Implementation(
        f"of the package {package}",
        build,
        lambda module, cell: loaded().wrap(module, cell),
        unusable,
    )


OWN = tuple(IMPLEMENTATIONS)
_OFFERS = {
    point.name: point
    for point in metadata.entry_points(group="resblock_bench.implementations")
    if point.name not in IMPLEMENTATIONS
}
IMPLEMENTATIONS.update({name: _offered(point) for name, point in _OFFERS.items()})


def unusable_here(name: str, device: str) -> str | None:
    """Why an implementation cannot run on "cpu" or "cuda" here, or None."""
    return not_offered(name) or IMPLEMENTATIONS[name].unusable(device)


def refusal(cell: Cell) -> str | None:
    """Why an implementation is not made for a cell, or None; the code of others is not asked."""
    return IMPLEMENTATIONS[cell.impl].can.refusal(cell) if cell.impl in IMPLEMENTATIONS else None


def not_offered(name: str) -> str | None:
    """Why there is no such implementation, or None."""
    if name in IMPLEMENTATIONS:
        return None
    return f"no installed package offers the implementation {name!r}: install the one that does"


def module_offering(name: str) -> str | None:
    """The module of another package in which an implementation is; None for this project's own."""
    return _OFFERS[name].module if name in _OFFERS else None


def runs_kernels(name: str) -> bool:
    """Whether an implementation runs this project's kernels, or may."""
    return name == "fused" or name not in OWN


def versions_of(cell: Cell) -> dict[str, str]:
    """The versions of other projects' packages that a cell runs, by their names."""
    found = {} if cell.config is None else diffusers_model.version()
    version = PEERS[cell.impl].version() if cell.impl in PEERS else None
    return found if version is None else {**found, PEERS[cell.impl].distribution: version}


def caution(name: str) -> str:
    """What is known to be wrong with an implementation; "" for nothing."""
    return PEERS[name].caution if name in PEERS else ""


def compiles(name: str) -> bool:
    """Whether torch.compile is in an implementation."""
    return name in IMPLEMENTATIONS and IMPLEMENTATIONS[name].compiles


def packages_of(name: str) -> tuple[str, ...]:
    """The packages that hold an implementation's code."""
    if name in _OFFERS:
        return (_OFFERS[name].module.partition(".")[0],)
    return "resblock_bench.reference", "resblock_bench.kernels"


def declined(error: Exception) -> bool:
    """Whether torch.compile or a peer refused a block, rather than the block failing."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException | DeclinedError)
