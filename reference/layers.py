"""The small parts that every block is made of.

Convolutions and pools by number of spatial dimensions, the group norm that computes in
float32, the zeroed module, and the sinusoidal timestep embedding.

References
    Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672
    Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233
    Wu & He, Group Normalization, arXiv:1803.08494
    Vaswani et al., Attention Is All You Need (sinusoidal positions), arXiv:1706.03762

Shapes: N batch, C channels, G groups, D width of an embedding, ``*S`` one to three spatial sizes.
"""

import math
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments

ConvNd: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
AvgPoolNd: TypeAlias = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
M = TypeVar("M", bound=nn.Module)

GROUPS = 32  # of every normalization() in the published models, whatever their width

# y = x · sigmoid(x), elementwise. PyTorch's own class serves: one kernel, and only x is saved
# for the backward, where the product written out would save x and the sigmoid.
SiLU = nn.SiLU


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` without its crash, see ``group_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 and returned in the dtype of its input.

    y = (x − μ) / sqrt(σ² + eps) · γ + β, with μ and σ² over the C/G channels and all positions
    of one group of one sample, γ and β per channel. In a 16-bit model γ and β stay float32: it
    is the statistics and the affine that must not be rounded. A float64 input is not rounded
    either, so that the block can serve as its own float64 truth.

    x: (N, C, *S) -> the same shape and dtype. Source: guided-diffusion ``nn.GroupNorm32``.
    Arguments as in ``nn.GroupNorm``; ValueError or TypeError for impossible ones.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments.group_norm(self, num_groups, num_channels, eps)
        arguments.flags(self, affine=affine)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(compute)
        bias = None if self.bias is None else self.bias.to(compute)
        return group_norm(x.to(compute), self.num_groups, weight, bias, self.eps).to(x.dtype)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``F.group_norm``, without PyTorch's crash.

    On the CPU its backward of channels-last x writes to the gradient of x, which is not there where
    only weight or bias wants one (a frozen encoder, a block alone): the process ends by a
    segmentation fault (PyTorch 2.6 to 2.13). Such x goes through the other layout and back. (Where
    x wants a gradient and torch.autograd.grad is asked for those of parameters alone, PyTorch still
    crashes: nothing in the forward tells. Ask for that of x, too.)
    """
    parameters = [p for p in (weight, bias) if p is not None]
    if (
        x.device.type != "cpu"
        or x.requires_grad
        or x.is_contiguous()
        or not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))
    ):
        return F.group_norm(x, num_groups, weight, bias, eps)
    y = F.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    return torch.empty_like(x).copy_(y)


def normalization(channels: int) -> GroupNorm32:
    """The norm of every OpenAI block: ``GroupNorm32(32, channels)``, eps 1e-5.

    Raises ValueError where 32 groups do not divide the channels.
    """
    arguments.integers("normalization", -math.inf, channels=channels)
    if channels <= 0 or channels % GROUPS:
        raise ValueError(
            f"normalization({channels}): {channels} channels cannot be split into {GROUPS} equal "
            f"groups; use a positive multiple of {GROUPS} channels, or a GroupNorm32 with another "
            "number of groups"
        )
    return GroupNorm32(GROUPS, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> ConvNd:
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, by the number of spatial dimensions.

    The rest of the arguments are the convolution's own. Raises ValueError for other ``dims``.
    """
    arguments.one_of("conv_nd", (1, 2, 3), dims=dims)
    convolutions: tuple[type[ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return convolutions[dims - 1](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> AvgPoolNd:
    """``nn.AvgPool1d``, ``nn.AvgPool2d`` or ``nn.AvgPool3d``, by the number of dimensions.

    The rest of the arguments are the pool's own. Raises ValueError for other ``dims``.
    """
    arguments.one_of("avg_pool_nd", (1, 2, 3), dims=dims)
    pools: tuple[type[AvgPoolNd], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    return pools[dims - 1](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """``nn.Linear``, under the name that the original code gives it."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: M) -> M:
    """Set every parameter of ``module`` to zero and return it.

    On the last convolution of a residual branch this makes the block its skip path at the start
    of training (and makes any test of a fresh block blind to its branch: re-randomise first).
    """
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of diffusion times, cosines first.

    With half = dim // 2 and ω_i = max_period^(−i/half), i < half, the row of time t is
    [cos(t·ω_0) … cos(t·ω_{half−1}), sin(t·ω_0) … sin(t·ω_{half−1})], plus one zero if dim is odd.

    timesteps: (N,), integer or fractional -> (N, dim) float32, on the device of ``timesteps``.
    Raises ValueError for another shape or for dim < 2.
    """
    if not isinstance(timesteps, Tensor):
        raise TypeError(
            "timestep_embedding: timesteps must be a tensor of shape (N,), got "
            + arguments.received(timesteps)
        )
    if timesteps.ndim != 1:
        raise ValueError(
            f"timestep_embedding: timesteps must have shape (N,), got {tuple(timesteps.shape)}; "
            "for one time t of a whole batch pass t.expand(N)"
        )
    arguments.integers("timestep_embedding", 2, dim=dim)
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    omega = torch.exp(-math.log(max_period) * exponent)
    angle = timesteps.float()[:, None] * omega  # (N, half)
    embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))
