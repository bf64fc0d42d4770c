"""diffusers' models and blocks, small, from their configs: nothing is fetched from anywhere."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from .oracle import error

# Before huggingface_hub, which diffusers imports, reads them.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
    from diffusers.models.resnet import ResnetBlock2D

Inputs = tuple[Any, ...]


def block(**options: Any) -> Any:
    """A ResnetBlock2D of 16 channels that differ from the embedding's 12."""
    arguments = {"in_channels": 16, "temb_channels": 12, "groups": 4, "eps": 1e-5}
    return randomise(ResnetBlock2D(**(arguments | options)))


def unet(**options: Any) -> Any:
    arguments = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return randomise(UNet2DModel(**(arguments | options)))


def conditional(**options: Any) -> Any:
    arguments = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return randomise(UNet2DConditionModel(**(arguments | options)))


def autoencoder(**options: Any) -> Any:
    arguments = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return randomise(AutoencoderKL(**(arguments | options)))


def ncsnpp() -> Any:
    """Resamples by FIR filters, within its blocks and beside them."""
    return unet(
        block_out_channels=(32, 32),
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )


def resnet_resampling(**options: Any) -> Any:
    """Blocks that resample inside, as ADM's do."""
    return unet(downsample_type="resnet", upsample_type="resnet", **options)


def simple_attention() -> Any:
    """As DeepFloyd's: resampling blocks, scale and shift, the embedding not activated, GELU."""
    return conditional(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
        act_fn="gelu",
    )


def _image(n: int, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def tiny() -> Any:
    """With what a UNet2DModel has at least."""
    return unet(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )


def of_unet(n: int = 2) -> Inputs:
    return _image(n), torch.tensor([1.0, 500.0])[:n]


def of_classes(n: int = 2) -> Inputs:
    return *of_unet(n), torch.arange(n)


def of_conditional(n: int = 2) -> Inputs:
    text = torch.randn(n, 5, 12, generator=torch.Generator().manual_seed(2))
    return _image(n, 4), torch.tensor([1.0, 500.0])[:n], text


def of_autoencoder(n: int = 2) -> Inputs:
    return (_image(n),)


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Inputs]]] = {
    "UNet2DModel": (unet, of_unet),
    "UNet2DModel, scale and shift": (
        lambda: unet(resnet_time_scale_shift="scale_shift"),
        of_unet,
    ),
    "UNet2DModel, resampling blocks": (
        lambda: resnet_resampling(resnet_time_scale_shift="scale_shift"),
        of_unet,
    ),
    "UNet2DModel, resampling blocks that add": (resnet_resampling, of_unet),
    "UNet2DModel, classes": (lambda: unet(num_class_embeds=4), of_classes),
    "UNet2DModel, embedded classes": (lambda: unet(class_embed_type="timestep"), of_classes),
    "UNet2DModel, FIR": (ncsnpp, of_unet),
    "UNet2DConditionModel": (conditional, of_conditional),
    "UNet2DConditionModel, scale and shift": (
        lambda: conditional(resnet_time_scale_shift="scale_shift"),
        of_conditional,
    ),
    "UNet2DConditionModel, simple attention": (simple_attention, of_conditional),
    "AutoencoderKL": (autoencoder, of_autoencoder),
}


class Known(NamedTuple):
    """A model as it was, what it makes of its inputs, and what it should."""

    model: Any
    inputs: Inputs
    outcome: dict[str, Tensor]
    truth: dict[str, Tensor]


@functools.cache
def known(name: str) -> Known:
    """Of one of the MODELS; not to be changed."""
    make, of = MODELS[name]
    model, inputs = make(), of()
    return Known(model, inputs, outcome(model, inputs), truth(model, inputs))


def randomise(module: nn.Module) -> nn.Module:
    """Weights of one size, for whatever starts at zero or at one."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / p[0].numel() ** 0.5))
            if p.dim() == 1:
                p.add_(0.5)
    return module


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    )


def outcome(model: nn.Module, inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """The output, and the gradients of the image and of the parameters, by name."""
    torch.manual_seed(seed)
    x = inputs[0].detach().requires_grad_()
    y = model(x, *inputs[1:])
    y = y if isinstance(y, Tensor) else y.sample
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    wanted = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), g, allow_unused=True)
    gradients = {n: d for n, d in zip(wanted, found, strict=True) if d is not None}
    return {"y": y.detach()} | gradients


def check(
    original: dict[str, Tensor],
    fused: dict[str, Tensor],
    truth: dict[str, Tensor],
    floor: float = 2e-5,
) -> None:
    """Assert that what is fused is at most twice as wrong as the original, or right to `floor`."""
    assert original.keys() == fused.keys() == truth.keys()
    # A gradient that is next to nothing beside the largest is held to a share of that one: what
    # does not matter, such as the bias of a key, has rounding for a gradient.
    largest = max((float(t.norm()) for name, t in truth.items() if name != "y"), default=0.0)
    for name, t in truth.items():
        assert fused[name].dtype == original[name].dtype, name
        assert fused[name].shape == original[name].shape, name
        scale = max(float(t.norm()), 0.0 if name == "y" else 1e-3 * largest)
        off = float((fused[name].double() - t).norm()) / scale
        limit = max(floor, 2 * float((original[name].double() - t).norm()) / scale)
        assert off <= limit, f"{name}: off by {off:.3g}, limit {limit:.3g}"


def overall(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The error of all that was computed together."""
    return error(
        *(torch.cat([d[name].double().flatten() for name in truth]) for d in (found, truth))
    )


def in_64_bits(model: nn.Module) -> nn.Module:
    exact = copy.deepcopy(model).double()
    for name, module in exact.named_modules():
        if name == "time_proj":  # whose fp32 a UNet2DModel takes for classes as it is
            module.register_forward_hook(lambda module, args, out: out.double())
    return exact


def truth(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return outcome(in_64_bits(model), cast(inputs, torch.float64))
