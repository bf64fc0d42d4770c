"""The blocks of Hugging Face's diffusers: its residual block, and what ends its models.

The package need not be installed: a class is known by its name and its module's. ResnetBlock2D is

    h = conv1(resample(act(norm1(x))))
    e = time_emb_proj(act(temb))         without act if skip_time_act; none without time_emb_proj
    h = norm2(h)·(1 + scale) + shift     time_embedding_norm "scale_shift", [scale, shift] = e
    h = norm2(h + e)                     "default"; any other where there is no embedding
    h = conv2(dropout(act(h)))
    y = (conv_shortcut(resample(x)) + h) / output_scale_factor

Activations that are no SiLU, filters that resample (FIR) and layers with hooks are called. Whatever
else a block is given goes to its own class's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from resblock_bench.kernels.alterations import is_exactly, recomputable, replaced
from resblock_bench.kernels.blocks import FusedBlock, embeds
from resblock_bench.kernels.modules import GroupNormSiLU, normalise
from resblock_bench.kernels.op import Kernel, residual_add
from resblock_bench.kernels.resample import Direction
from resblock_bench.reference.checkpoint import checkpoint

from .family import (
    Context,
    Found,
    checkpoint_attributes,
    describe_block,
    features_of,
    fused_class,
    named,
    parameter_of,
    random_like,
    unfused_class,
)

Layer = Callable[[Tensor], Tensor]

_NORM = (nn.GroupNorm,)
_SILU = (nn.SiLU,)
_TIME_NORMS = ("default", "scale_shift")
_ATTRIBUTES = (
    "norm1", "conv1", "time_emb_proj", "norm2", "dropout", "conv2", "nonlinearity", "upsample",
    "downsample", "conv_shortcut", "time_embedding_norm", "skip_time_act", "output_scale_factor",
)  # fmt: skip


def recognise(module: nn.Module, context: Context) -> Found | None:
    cls = unfused_class(module)
    if cls is nn.SiLU:
        return _recognise_silu(module, context)
    known = next((c for c in cls.__mro__ if _known(c)), None)
    if known is None:
        return None
    if known.__name__ == "ResnetBlockCondNorm2D":
        why = (
            "its norms depend on the embedding or on the latent, other than by a scale and a shift"
        )
        return Found(None, f"{cls.__name__}: {why}")
    if known.__name__ != "ResnetBlock2D":
        return _recognise_end(module, _ENDS[known.__name__], context) if cls is known else None
    block: Any = module
    norms = [m for name in ("norm1", "norm2") if (m := getattr(block, name, None)) is not None]
    if cls is not known:
        why = f"{cls.__name__} is a subclass that may compute otherwise"
        return Found(None, why, parts=norms)
    altered = "it has a forward of its own" if "forward" in vars(block) else _alteration(block)
    if altered is not None:
        return Found(None, f"{cls.__name__} is not as built: {altered}", parts=norms)
    mode = context.mode(block.checkpoint if isinstance(block, FusedBlock) else "none")
    what = describe_block(cls.__name__, mode, _called(block))
    return Found(FusedResnetBlock2D, what, norms, checkpoint_attributes(mode), _inputs)


def _known(cls: type) -> bool:
    blocks = ("ResnetBlock2D", "ResnetBlockCondNorm2D")
    named = cls.__name__ in blocks or cls.__name__ in _ENDS
    return named and cls.__module__.startswith("diffusers.")


class FusedResnetBlock2D(FusedBlock):
    """Mixin of a ResnetBlock2D."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    dropout: nn.Module
    time_emb_proj: nn.Module | None
    conv_shortcut: nn.Module | None
    upsample: Layer | None
    downsample: Layer | None
    time_embedding_norm: str
    skip_time_act: bool
    output_scale_factor: float
    training: bool

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        # A model that checkpoints its blocks does not want them checkpointed inside, too.
        full = self.checkpoint == "full" and torch.is_grad_enabled() and not _in_checkpoint()
        return checkpoint(self._fused, (input_tensor, temb, *args), (), full, **kwargs)

    def _fused(self, x: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._projects(x, temb) or _alteration(self) is not None:
            theirs: Tensor = super().forward(x, temb, *args, **kwargs)  # type: ignore[misc]
            return theirs
        if self.upsample is not None and len(x) >= 64:
            x = x.contiguous()  # as theirs: large batches are not upsampled in channels-last
        between = _between(self, self.norm2)
        h, bias = self._residual_branch(
            x,
            self._embedding(temb),
            (self.norm1, self.conv1),
            (self.norm2, self.conv2),
            modulated=self.time_embedding_norm == "scale_shift",
            dropout_p=_dropout_p(self.dropout) if self.dropout not in between else 0.0,
            resample=None if _between(self, self.norm1) else _direction(_resampler(self)),
        )
        resample = _resampler(self)
        if resample is not None:
            x = resample(x)
        if self.conv_shortcut is not None:
            if self.training:
                x = x.contiguous()  # as theirs: DDP wants gradients in the layout of weights
            x = self.conv_shortcut(x)
        if bias is not None:
            return residual_add(x, h, bias, 1 / self.output_scale_factor)
        return x + h if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor

    def _projects(self, x: Tensor, temb: Tensor | None) -> bool:
        """Whether there is an embedding for every sample and a layer for it, or neither."""
        if self.time_emb_proj is None or temb is None:
            neither = self.time_emb_proj is None and temb is None
            return neither and self.time_embedding_norm != "scale_shift"
        return embeds(temb, x)

    def _embedding(self, temb: Tensor | None) -> Tensor | None:
        if temb is None or self.time_emb_proj is None:
            return None
        e: Tensor = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        return e

    def _norm_act_conv(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        conv: nn.Module,
        *,
        dropout_p: float = 0.0,
        resample: Direction | None = None,
        without_bias: Kernel | None = None,
        **modulation: Tensor | None,
    ) -> Tensor:
        between = _between(self, norm)
        if not between:
            return super()._norm_act_conv(
                x,
                norm,
                conv,
                dropout_p=dropout_p,
                resample=resample,
                without_bias=without_bias,
                **modulation,
            )
        activation: Literal["silu"] | None = None if self.nonlinearity in between else "silu"
        h = normalise(norm, x, **modulation, activation=activation, dropout_p=dropout_p)
        for layer in between:
            h = layer(h)
        return cast(Tensor, conv(h)) if without_bias is None else without_bias.convolve(h)


def _alteration(block: Any) -> str | None:
    """What in a ResnetBlock2D is other than its class builds it, of what is not called."""
    for name in _ATTRIBUTES:
        if not hasattr(block, name):
            return f"it has no {name}"
    for name in ("norm1", "norm2"):
        if (found := replaced(getattr(block, name), _NORM)) is not None:
            return f"{name} {found}"
    if block.time_emb_proj is not None and block.time_embedding_norm not in _TIME_NORMS:
        return f"time_embedding_norm is {block.time_embedding_norm!r}"
    return None


def _between(block: Any, norm: nn.Module) -> list[Layer]:
    """What is called between a norm and its convolution, since it is not fused with them."""
    layers: list[Layer] = []
    if not is_exactly(block.nonlinearity, _SILU):
        layers.append(block.nonlinearity)
    if norm is block.norm2:
        dropout = block.dropout
        if layers or not is_exactly(dropout, (nn.Dropout,)) or _dropout_p(dropout) == 1:
            layers.append(dropout)
    else:
        resample = _resampler(block)
        if resample is not None and (layers or _direction(resample) is None):
            layers.append(resample)
    return layers


def _dropout_p(dropout: Any) -> float:
    return float(dropout.p) if dropout.training else 0.0


def _resampler(block: Any) -> Layer | None:
    found: Layer | None = block.downsample if block.upsample is None else block.upsample
    return found


def _direction(resample: Any) -> Direction | None:
    """Of a resampling that is nearest-neighbour times two or the mean of two by two."""
    if isinstance(resample, partial):
        if resample.args:
            return None
        if resample.func is F.interpolate:
            doubles = resample.keywords == {"scale_factor": 2.0, "mode": "nearest"}
            return "up" if doubles else None
        halves = resample.keywords == {"kernel_size": 2, "stride": 2}
        return "down" if resample.func is F.avg_pool2d and halves else None
    if not isinstance(resample, nn.Module) or not is_exactly(resample, (type(resample),)):
        return None
    if not type(resample).__module__.startswith("diffusers."):
        return None
    layer: Any = resample
    name = type(layer).__name__
    if name not in ("Upsample2D", "Downsample2D"):
        return None
    if layer.use_conv or getattr(layer, "norm", None) is not None:
        return None
    if name == "Upsample2D":
        usual = not layer.use_conv_transpose and getattr(layer, "interpolate", True)
        return "up" if usual else None
    if not is_exactly(layer.conv, (nn.AvgPool2d,)):
        return None
    pool = layer.conv
    usual = pool.kernel_size == pool.stride == 2 and pool.padding == 0 and not pool.ceil_mode
    return "down" if usual else None


def _called(block: Any) -> list[str]:
    """The convolutions that keep their input in selective mode, and why."""
    kept = []
    for number, norm in ((1, block.norm1), (2, block.norm2)):
        conv = getattr(block, f"conv{number}")
        if between := _between(block, norm):
            names = [getattr(layer, "__name__", type(layer).__name__) for layer in between]
            kept.append(f"conv{number} (behind {names[0].replace('<lambda>', 'a function')})")
        elif not recomputable(conv):
            kept.append(named(f"conv{number}", conv))
    return kept


def _inputs(block: Any) -> tuple[Tensor, Tensor | None]:
    like = parameter_of(block)
    x = random_like(like, 2, block.norm1.num_channels, 8, 8)
    if block.time_emb_proj is None:
        return x, None
    return x, random_like(like, 2, features_of(block.time_emb_proj))


_CHECKPOINT = torch.utils.checkpoint.__file__


def _in_checkpoint() -> bool:
    """Whether torch's checkpoint, of either kind, runs what calls this, whether first or again.

    By the frames of the call: nothing public tells, and what is private is newer than torch 2.6.
    """
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        if caller.f_code.co_filename == _CHECKPOINT:
            return True
        frame = caller
    return False


class FusedEnd:
    """Mixin of a module whose forward calls a norm and then the SiLU behind it, by their names.

    The norm takes in the activation, whose own module then passes its input on. Whether it does is
    decided anew in every forward, since either may have got hooks or been exchanged.
    """

    _names: ClassVar[tuple[str, str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        norm, activation = (getattr(self, name) for name in self._names)
        fused = isinstance(norm, GroupNormSiLU) and isinstance(activation, PassedSiLU)
        taken = fused and _altered_end(self, self._names) is None
        if isinstance(norm, GroupNormSiLU) and (norm.activation is not None) is not taken:
            norm.activation = "silu" if taken else None
        if isinstance(activation, PassedSiLU) and activation.passes is not taken:
            activation.passes = taken
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class FusedHead(FusedEnd):
    """Of whole models, and of the two halves of an autoencoder."""

    _names = ("conv_norm_out", "conv_act")


class FusedSkip(FusedEnd):
    """Of the upward blocks that add an image of every resolution."""

    _names = ("skip_norm", "act")


class PassedSiLU:
    """Mixin of the SiLU of such a pair: passes its input on where the norm has taken it in."""

    passes: bool = False

    def forward(self, input: Tensor) -> Tensor:
        return input if self.passes else super().forward(input)  # type: ignore[misc]


_ENDS: dict[str, type[FusedEnd]] = {
    "UNet2DModel": FusedHead,
    "UNet2DConditionModel": FusedHead,
    "Encoder": FusedHead,
    "Decoder": FusedHead,
    "SkipUpBlock2D": FusedSkip,
    "AttnSkipUpBlock2D": FusedSkip,
}
_END_NORMS: tuple[type[nn.Module], ...] = (GroupNormSiLU, nn.GroupNorm)
_END_SILUS: tuple[type[nn.Module], ...] = (fused_class(PassedSiLU, nn.SiLU), nn.SiLU)


def _recognise_end(module: nn.Module, mixin: type[FusedEnd], context: Context) -> Found | None:
    norm, activation = (module._modules.get(name) for name in mixin._names)
    if norm is None or activation is None:
        return None
    name = type(module).__name__
    altered = _altered_end(module, mixin._names)
    if "forward" in vars(module):
        altered = "it has a forward of its own"
    for part, called in zip((norm, activation), mixin._names, strict=True):
        if altered is None and len(context.owners[part]) > 1:
            altered = f"{called} stands in another place, too"
    if altered is not None:
        return Found(None, f"{name} has another head than is built: {altered}")
    what = f"{name} with {' and '.join(mixin._names)} in one"
    return Found(mixin, what, held=False)


def _altered_end(module: Any, names: tuple[str, str]) -> str | None:
    for name, kinds in zip(names, (_END_NORMS, _END_SILUS), strict=True):
        if (found := replaced(module._modules[name], kinds)) is not None:
            return f"{name} {found}"
    return None


def _recognise_silu(module: nn.Module, context: Context) -> Found | None:
    for owner in context.owners.get(module, ()):
        mixin = _ENDS.get(type(owner).__name__)
        if mixin is not None and isinstance(owner, mixin):
            norm, activation = mixin._names
            if owner._modules.get(activation) is module:
                what = f"SiLU that {norm} takes in"
                return Found(PassedSiLU, what, attributes={"passes": False}, held=False)
    return None
