"""The operator in PyTorch's own kernels: the path of every device and dtype without Triton.

Adaptive group norm is one call of ATen's group norm: N samples of C channels in G groups are one
sample of N·C channels in N·G groups, whose per-channel affine may then differ from sample to
sample. Channels-last tensors cannot be viewed so and go sample by sample. Everything the backward
needs is computed again from x, so nothing but x and the small tensors is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resblock_bench.kernels.spec import Modulation, Spec, memory_format, spread

aten = torch.ops.aten


def forward(x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec) -> Tensor:
    """y = dropout(act(norm(x + pre_shift)·γ' + β'))."""
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=spec.out_dtype)
    h = _input(x, modulation)
    gain, offset = modulation.folded(x, _statistics_dtype(h))
    parts = []
    for rows, part in _calls(h):
        z, _, _ = _group_norm(part, gain[rows], offset[rows], spec)
        if spec.activation:
            z = aten.silu_(z)
        parts.append(z)
    y = _join(parts, h)
    if seed is not None and spec.dropout_p > 0:
        y = y.mul_(keep_mask(seed, y, spec.dropout_p))
    return y.to(spec.out_dtype)


def backward(
    dy: Tensor, x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """dx, and the sums (S1, S2, db) of `Modulation.gradients`."""
    N, C = x.shape[:2]
    if x.numel() == 0:
        empty = x.new_zeros((N, C), dtype=_statistics_dtype(x))
        return torch.zeros_like(x), (empty, empty, empty)
    h = _input(x, modulation)
    gain, offset = modulation.folded(x, _statistics_dtype(h))
    dy = dy.to(h.dtype)
    if seed is not None and spec.dropout_p > 0:
        dy = dy * keep_mask(seed, dy, spec.dropout_p)
    parts, s1, s2 = [], [], []
    for (rows, part), (_, dz) in zip(_calls(h), _calls(dy), strict=True):
        normalise = _about_x if modulation.scale is None else _about_x_hat
        about, z, mean, rstd, row_gain = normalise(part, gain[rows], offset[rows], spec)
        if spec.activation:
            dz = aten.silu_backward.grad_input(dz, z, grad_input=z)
        dx, dgain, doffset = aten.native_group_norm_backward(
            dz,
            about,
            mean,
            rstd,
            row_gain.reshape(-1),
            1,
            part.shape[1],
            part[0, 0].numel(),
            rstd.numel(),
            [True, True, True],
        )
        parts.append(dx)
        s1.append(doffset)
        s2.append(dgain)
    dh = _join(parts, h)
    db = None
    if modulation.pre_shift is not None:
        db = dh.sum(tuple(range(2, dh.dim())), dtype=gain.dtype)
    return dh.to(x.dtype), (_rows(s1, N, C), _rows(s2, N, C), db)


def _input(x: Tensor, modulation: Modulation) -> Tensor:
    """x + pre_shift, in the dtype in which group norm is computed on this device."""
    # On the CPU ATen's group norm reads 16-bit x beside fp32 affine and statistics; elsewhere
    # both must have one dtype. The sum with pre_shift is not rounded to 16 bits.
    if x.element_size() < 4 and (x.device.type != "cpu" or modulation.pre_shift is not None):
        x = x.float()
    if modulation.pre_shift is not None:
        x = x + spread(modulation.pre_shift.to(x.dtype), x)
    return x


def _statistics_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _calls(h: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What one ATen call takes: the samples, and h over them as one sample."""
    N, C = h.shape[:2]
    if memory_format(h) == torch.contiguous_format:
        yield slice(None), h.reshape(1, N * C, -1)
    else:
        for n in range(N):
            yield slice(n, n + 1), h[n : n + 1]


def _rows(parts: list[Tensor], N: int, C: int) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(N, C)


def _join(parts: list[Tensor], h: Tensor) -> Tensor:
    """The results of all calls in the shape and layout of h."""
    # A lone channels-last sample is not viewed as itself: that would change the stride of its
    # batch dimension, and torch.cat no longer see the layout.
    return parts[0].view_as(h) if memory_format(h) == torch.contiguous_format else torch.cat(parts)


def _group_norm(
    part: Tensor, gain: Tensor, offset: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = aten.native_group_norm(
        part,
        gain.reshape(-1),
        offset.reshape(-1),
        1,
        part.shape[1],
        part[0, 0].numel(),
        gain.shape[0] * spec.num_groups,
        spec.eps,
    )
    return out


# What a backward is taken about: (its input, z, mean, rstd, gain).
_About = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _about_x(part: Tensor, gain: Tensor, offset: Tensor, spec: Spec) -> _About:
    """As eager PyTorch takes it, and as accurate."""
    z, mean, rstd = _group_norm(part, gain, offset, spec)
    return part, z, mean, rstd, gain


def _about_x_hat(part: Tensor, gain: Tensor, offset: Tensor, spec: Spec) -> _About:
    """About the normalised x̂, whose mean is 0 and rstd 1.

    Eager takes the gradient of scale from the normalised activation; about x, ATen's sums would
    cancel where |mean| ≫ std and that gradient be less accurate than eager's. dx is linear in the
    gain, so the true rstd goes there.
    """
    zeros, ones = torch.zeros_like(gain), torch.ones_like(gain)
    x_hat, _, rstd = _group_norm(part, ones, zeros, spec)
    # x̂·gain + offset: batch norm's inference form at mean 0 and variance 1.
    z = torch.batch_norm(
        x_hat,
        gain.reshape(-1),
        offset.reshape(-1),
        zeros.view(-1),
        ones.view(-1),
        training=False,
        momentum=0.0,
        eps=0.0,
        cudnn_enabled=False,
    )
    groups = rstd.numel()
    scaled_gain = gain.view(groups, -1) * rstd.view(groups, 1)
    mean_0, rstd_1 = zeros.view(1, -1)[:, :groups], ones.view(1, -1)[:, :groups]
    return x_hat, z, mean_0, rstd_1, scaled_gain


@torch.library.custom_op("resblock_bench::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """1/(1 − p) where an element is kept and 0 where it is dropped, the same for the same seed.

    A custom operator because the seed is read on the host, which fake tensors and torch.compile
    cannot follow otherwise. Drawn in logical order, so a mask does not depend on the layout.
    """
    generator = torch.Generator(device=like.device).manual_seed(int(seed.item()))
    # Four elements to a 64-bit draw: on the CPU the mask so costs a quarter of F.dropout's, and it
    # is drawn again where F.dropout's is kept. p is met to within 2⁻¹⁶.
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    uniform = draws.view(torch.int16)[: like.numel()].view(like.shape)
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    mask = (uniform >= threshold).to(like.dtype).mul_(1 / (1 - p))
    return mask.contiguous(memory_format=memory_format(like))


@keep_mask.register_fake
def _(seed: Tensor, like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like, memory_format=memory_format(like))
