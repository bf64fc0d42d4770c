"""Blocks and kernels of other projects, each called as its own users call it.

None is needed, and none is imported before a cell is built with it. Beside each stands the version
in which its signature was read; docs/peers.md says which have been run.

A norm of another project takes the place of the reference's inside the reference's block. Its
parameters have the same names, so the block's state dict is the reference's. In 16 bits it is given
what the block has: activations of 16 bits and float32 parameters.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from resblock_bench.bench.records import Cell, DType, Layout, Mode
from resblock_bench.reference import ResBlock as ReferenceResBlock
from resblock_bench.reference.layers import GROUPS

Arguments = Mapping[str, Any]
"""Those of reference.ResBlock."""
Layers = tuple[nn.Module, bool]
"""What stands in a norm's place, and whether it takes in the SiLU behind it."""


class DeclinedError(Exception):
    """A block that a peer does not compute itself, though it would return a result."""


@dataclass(frozen=True)
class Ability:
    """What an implementation is made for; by default everything that a cell can be."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = get_args(Mode)
    dtypes: tuple[str, ...] = get_args(DType)
    layouts: tuple[str, ...] = get_args(Layout)
    dims: tuple[int, ...] = (1, 2, 3)

    def refusal(self, cell: Cell) -> str | None:
        """Why it has no such cell, or None."""
        axes = {"mode": self.modes, "dtype": self.dtypes, "layout": self.layouts, "dims": self.dims}
        for axis, allowed in axes.items():
            if getattr(cell, axis) not in allowed:
                listed = ",".join(map(str, allowed))
                return f"{cell.impl} takes {axis}={listed} only: leave out the others for it"
        return None

    def __str__(self) -> str:
        dims = ",".join(map(str, self.dims))
        parts = (self.modes, self.dtypes, self.layouts, (f"{dims}-D",), self.devices)
        return "; ".join(", ".join(part) for part in parts)


EVERYTHING = Ability()


@dataclass(frozen=True)
class Peer:
    """Another project's block or kernels.

    description   what is measured
    modules       one of which is imported: the first that is there
    distribution  the package that holds them
    install       what to do where it is missing
    build         of a block's arguments, the block
    can           what it is made for; it is used for nothing else, not even where it falls back
    caution       what is known to be wrong with it, said beside a row that is wrong or fails
    """

    description: str
    modules: tuple[str, ...]
    distribution: str
    install: str
    build: Callable[[Arguments], nn.Module]
    can: Ability
    caution: str = ""

    def missing(self) -> str | None:
        """Why it cannot be imported here, or None."""
        if any(map(_located, self.modules)):
            return None
        top = self.modules[0].partition(".")[0]
        if _located(top):
            return f"the {top} that is installed has no {' or '.join(self.modules)}: {self.install}"
        return f"{top} is not installed: {self.install}"

    def version(self) -> str | None:
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def _located(module: str) -> bool:
    """Whether a module can be found by its file: to import it would run whatever it runs."""
    top, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not rest:
        return spec is not None
    paths = [Path(f, *rest.split(".")) for f in spec.submodule_search_locations or ()]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)


def _imported(name: str) -> Any:
    """The module of a peer, which has no types here."""
    modules = PEERS[name].modules
    found: ModuleType = importlib.import_module(next(filter(_located, modules), modules[0]))
    return found


def _with_norms(make: Callable[[nn.GroupNorm, bool], Layers], arguments: Arguments) -> nn.Module:
    """The reference's block with norms that `make` gives for its own.

    make   of a norm, and whether a SiLU comes straight after it
    """
    block = ReferenceResBlock(**arguments)
    activated = (True, not block.use_scale_shift_norm)
    for layers, before_silu in zip((block.in_layers, block.out_layers), activated, strict=True):
        norm, takes_silu = make(cast(nn.GroupNorm, layers[0]), before_silu)
        layers[0] = norm
        if takes_silu:
            layers[1] = nn.Identity()
    return block


def _liger(norm: nn.GroupNorm, before_silu: bool) -> Layers:
    # liger-kernel 0.8.5, transformers/group_norm.py:
    # LigerGroupNorm(num_channels, num_groups, eps=1e-6, bias=False, init_fn="ones")
    made: nn.Module = _imported("liger").LigerGroupNorm(
        norm.num_channels, norm.num_groups, eps=norm.eps, bias=True
    )
    return made, False


def _liger_flat(norm: nn.GroupNorm, before_silu: bool) -> Layers:
    made, takes_silu = _liger(norm, before_silu)
    theirs = made.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = theirs(x.flatten(2))
        return y.reshape(x.shape)

    vars(made)["forward"] = forward
    return made, takes_silu


class _FlagGemsFunction(torch.autograd.Function):
    """flag_gems 5.0.2 has the signatures of ATen's native_group_norm (ops/groupnorm.py):

    group_norm(input, weight, bias, N, C, HxW, group, eps=1e-05) -> (y, mean, rstd)
    group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask)
    """

    @staticmethod
    def forward(ctx: Any, gems: "_FlagGemsNorm", x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor
        ctx.gems, ctx.sizes = gems, (*x.shape[:2], x[0, 0].numel(), gems.num_groups)
        y, mean, rstd = gems.theirs(x, weight, bias, *ctx.sizes, gems.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[1:])
        gradients = ctx.gems.their_backward(dy, x, mean, rstd, weight, *ctx.sizes, wanted)
        return None, *gradients


class _FlagGemsNorm(nn.GroupNorm):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        gems = _imported("flag-gems")
        self.theirs, self.their_backward = gems.group_norm, gems.group_norm_backward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FlagGemsFunction.apply(self, x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


def _flag_gems(norm: nn.GroupNorm, before_silu: bool) -> Layers:
    return _FlagGemsNorm(norm.num_groups, norm.num_channels, norm.eps), False


def _apex(norm: nn.GroupNorm, before_silu: bool) -> Layers:
    # NVIDIA/apex of 2025, contrib/group_norm/group_norm.py:
    # GroupNorm(num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=None)
    theirs = _imported("apex").GroupNorm
    if norm.num_channels not in theirs.SUPPORTED_CHANNELS:
        raise DeclinedError(
            f"this apex has no kernel for {norm.num_channels} channels, and would call PyTorch's: "
            f"it has {', '.join(map(str, sorted(theirs.SUPPORTED_CHANNELS)))}"
        )
    act = "silu" if before_silu else ""
    made: nn.Module = theirs(norm.num_groups, norm.num_channels, eps=norm.eps, act=act)
    return made, before_silu


class _SglangNormSiLU(nn.GroupNorm):
    """sglang 0.5, diffusion/triton/group_norm_silu.py:

    triton_group_norm_silu(x, weight, bias, num_groups, eps=1e-5)

    With parameters of another dtype than x it would call PyTorch's.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.theirs = _imported("sglang").triton_group_norm_silu

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y: Tensor = self.theirs(x, weight, bias, num_groups=self.num_groups, eps=self.eps)
        return y


def _sglang(norm: nn.GroupNorm, before_silu: bool) -> Layers:
    """A modulated norm stays the reference's: there is no kernel for one."""
    if not before_silu:
        return norm, False
    return _SglangNormSiLU(norm.num_groups, norm.num_channels, norm.eps), True


class _VllmOmniBlock(ReferenceResBlock):
    """vllm-omni 0.30, model_executor/models/common/ops:

    fused_group_norm_silu(x, weight, bias, num_groups=32, eps=1e-6)
    fused_adaptive_group_norm_silu(x, weight, bias, scale, shift, num_groups, eps=1e-6)
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not importlib.import_module("vllm.triton_utils").HAS_TRITON:
            raise DeclinedError("vllm finds no Triton here, and would call PyTorch's operators")
        ops = _imported("vllm-omni")
        self._norm_silu = ops.fused_group_norm_silu
        self._adaptive_norm_silu = ops.fused_adaptive_group_norm_silu

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, _, in_conv = self.in_layers
        h: Tensor = self._norm_silu(
            x, in_norm.weight, in_norm.bias, in_norm.num_groups, in_norm.eps
        )
        h = in_conv(self.h_upd(h))
        e: Tensor = self.emb_layers(emb).to(h.dtype)
        norm, _, out_drop, out_conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self._adaptive_norm_silu(
                h, norm.weight, norm.bias, scale, shift, norm.num_groups, norm.eps
            )
        else:
            h = h + e.reshape(*e.shape, *(1 for _ in h.shape[2:]))
            h = self._norm_silu(h, norm.weight, norm.bias, norm.num_groups, norm.eps)
        skip: Tensor = self.skip_connection(self.x_upd(x))
        h = out_conv(out_drop(h))
        return skip + h


class _DiffusersBlock(ReferenceResBlock):
    """diffusers' ResnetBlock2D, whose layers stand under the reference's names.

    diffusers 0.42, models/resnet.py: ResnetBlock2D(*, in_channels, out_channels, dropout,
    temb_channels, groups, eps, non_linearity, time_embedding_norm, up, down, …)
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        theirs: Any = _imported("diffusers").ResnetBlock2D(
            in_channels=self.channels,
            out_channels=self.out_channels,
            temb_channels=self.emb_channels,
            dropout=self.dropout,
            groups=GROUPS,
            eps=self.in_layers[0].eps,
            non_linearity="silu",
            time_embedding_norm="scale_shift" if self.use_scale_shift_norm else "default",
            up=arguments["up"],
            down=arguments["down"],
        )
        self.in_layers[0], self.in_layers[2] = theirs.norm1, theirs.conv1
        self.emb_layers[1] = theirs.time_emb_proj
        self.out_layers[0], self.out_layers[2] = theirs.norm2, theirs.dropout
        self.out_layers[3] = theirs.conv2
        if theirs.conv_shortcut is not None:
            self.skip_connection = theirs.conv_shortcut
        # No submodule: its parameters would have two names.
        self._theirs = (theirs,)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self._theirs[0](x, emb)
        return out


_INFERENCE = ("inference",)
_GPU = ("cuda",)
_ISSUE_1375 = "linkedin/Liger-Kernel#1375"

PEERS: dict[str, Peer] = {
    "liger": Peer(
        "the reference with Liger's group norm",
        ("liger_kernel.transformers.group_norm",),
        "liger-kernel",
        "pip install liger-kernel",
        functools.partial(_with_norms, _liger),
        Ability(devices=_GPU, layouts=("nchw",)),
        f"the backward of Liger's group norm writes out of bounds on images ({_ISSUE_1375}); "
        "impl=liger-flat gives it one spatial dimension, which it takes",
    ),
    "liger-flat": Peer(
        f"the same, given one spatial dimension ({_ISSUE_1375})",
        ("liger_kernel.transformers.group_norm",),
        "liger-kernel",
        "pip install liger-kernel",
        functools.partial(_with_norms, _liger_flat),
        Ability(devices=_GPU, layouts=("nchw",)),
    ),
    "flag-gems": Peer(
        "the reference with FlagGems' group norm",
        ("flag_gems",),
        "flag-gems",
        "pip install flag-gems",
        functools.partial(_with_norms, _flag_gems),
        Ability(devices=_GPU, layouts=("nchw",)),
    ),
    "apex": Peer(
        "the reference with NVIDIA apex's group norm, which takes in SiLU",
        ("apex.contrib.group_norm",),
        "apex",
        "build NVIDIA's apex from source with its group_norm extension; the package apex of PyPI "
        "is something else",
        functools.partial(_with_norms, _apex),
        Ability(devices=_GPU, layouts=("nhwc",), dims=(2,)),
    ),
    "diffusers": Peer(
        "diffusers' ResnetBlock2D",
        ("diffusers.models.resnet",),
        "diffusers",
        "pip install diffusers",
        lambda arguments: _DiffusersBlock(**arguments),
        # It adds a float32 embedding to activations of 16 bits, which its convolution refuses then.
        Ability(dtypes=("fp32",), dims=(2,)),
    ),
    "vllm-omni": Peer(
        "the reference with vLLM-Omni's fused norm, modulation and SiLU",
        ("vllm_omni.model_executor.models.common.ops",),
        "vllm-omni",
        "pip install vllm-omni",
        lambda arguments: _VllmOmniBlock(**arguments),
        Ability(devices=_GPU, modes=_INFERENCE, layouts=("nchw",)),
    ),
    "sglang": Peer(
        "the reference with SGLang's fused norm and SiLU where nothing modulates",
        (
            "sglang.kernels.ops.diffusion.triton.group_norm_silu",
            "sglang.jit_kernel.diffusion.triton.group_norm_silu",
        ),
        "sglang",
        'pip install "sglang[diffusion]"',
        functools.partial(_with_norms, _sglang),
        Ability(devices=_GPU, modes=_INFERENCE, layouts=("nchw",)),
    ),
}
