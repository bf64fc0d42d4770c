"""The operator in PyTorch's own kernels: the path of every device and dtype without Triton.

Adaptive group norm is one call of ATen's group norm: N samples of C channels in G groups are one
sample of N·C channels in N·G groups, whose per-channel affine may then differ from sample to
sample. Channels-last tensors cannot be viewed so and go sample by sample. The backward recomputes
z = x̂γ' + β' from x and the saved statistics, so nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resblock_bench.kernels.spec import Modulation, Spec, memory_format, spread

aten = torch.ops.aten


def forward(
    x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """y = dropout(act(norm(x + pre_shift)·γ' + β')), and every group's mean and rstd (N, G)."""
    h = _input(x, modulation)
    gain, offset = modulation.folded(x, _statistics_dtype(h))
    parts, means, rstds = [], [], []
    for rows, R in _batches(h):
        z, mean, rstd = aten.native_group_norm(
            _view(h[rows], R),
            gain[rows].reshape(-1),
            offset[rows].reshape(-1),
            1,
            R * h.shape[1],
            h[0, 0].numel(),
            R * spec.num_groups,
            spec.eps,
        )
        parts.append(_unview(z, h))
        means.append(mean.view(-1, spec.num_groups))
        rstds.append(rstd.view(-1, spec.num_groups))
    y = _finish(_join(parts, x), seed, spec)
    return y, torch.cat(means), torch.cat(rstds)


def recompute(
    x: Tensor, mean: Tensor, rstd: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec
) -> Tensor:
    """The forward's output once more, from the saved statistics."""
    return _finish(_normalised(_input(x, modulation), mean, rstd, modulation, spec), seed, spec)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    modulation: Modulation,
    seed: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """dx, and the sums (S1, S2, db) of `Modulation.gradients`."""
    h = _input(x, modulation)
    gain, _ = modulation.folded(x, mean.dtype)
    dz = dy.to(h.dtype)
    if seed is not None and spec.dropout_p > 0:
        dz = dz * keep_mask(seed, dz, spec.dropout_p)
    if spec.activation:
        z = _normalised(h, mean, rstd, modulation, spec)
        dz = aten.silu_backward.grad_input(dz, z, grad_input=z)
        del z
    parts, s1, s2 = [], [], []
    for rows, R in _batches(h):
        dx, dgain, doffset = aten.native_group_norm_backward(
            _view(dz[rows], R),
            _view(h[rows], R),
            mean[rows].reshape(-1, R * spec.num_groups),
            rstd[rows].reshape(-1, R * spec.num_groups),
            gain[rows].reshape(-1),
            1,
            R * h.shape[1],
            h[0, 0].numel(),
            R * spec.num_groups,
            [True, True, True],
        )
        parts.append(_unview(dx, h))
        s1.append(doffset.view(-1, h.shape[1]))
        s2.append(dgain.view(-1, h.shape[1]))
    dx = _join(parts, x)
    db = None
    if modulation.pre_shift is not None:
        db = dx.sum(tuple(range(2, dx.dim())), dtype=mean.dtype)
    return dx.to(x.dtype), (torch.cat(s1), torch.cat(s2), db)


def _input(x: Tensor, modulation: Modulation) -> Tensor:
    """x + pre_shift, in the dtype in which group norm is computed on this device."""
    # On the CPU ATen's group norm reads 16-bit x beside fp32 affine and statistics; elsewhere
    # both must have one dtype.
    if x.dtype.itemsize < 4 and (x.device.type != "cpu" or modulation.pre_shift is not None):
        x = x.float()
    if modulation.pre_shift is not None:
        x = x + spread(modulation.pre_shift.to(x.dtype), x)
    return x


def _statistics_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _batches(h: Tensor) -> Iterator[tuple[slice, int]]:
    """The samples that one ATen call takes, and how many of them it sees as one."""
    N = h.shape[0]
    if memory_format(h) == torch.contiguous_format:
        yield slice(0, N), N
    else:
        for n in range(N):
            yield slice(n, n + 1), 1


def _view(h: Tensor, R: int) -> Tensor:
    """(R, C, *spatial) → (1, R·C, HW); a single channels-last sample stays as it is."""
    return h if memory_format(h) != torch.contiguous_format else h.reshape(1, R * h.shape[1], -1)


def _unview(z: Tensor, h: Tensor) -> Tensor:
    # Only where _view changed the shape: viewing a lone channels-last sample as itself changes
    # the stride of its batch dimension, after which torch.cat no longer sees the layout.
    return z.view_as(h) if memory_format(h) == torch.contiguous_format else z


def _join(parts: list[Tensor], x: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _normalised(
    h: Tensor, mean: Tensor, rstd: Tensor, modulation: Modulation, spec: Spec
) -> Tensor:
    """z = (h − μ)·r·γ' + β' from saved statistics: batch norm's inference form, with a channel's
    mean and variance replaced by its group's."""
    C = h.shape[1]
    gain, offset = modulation.folded(h, mean.dtype)
    channel_rstd = rstd.repeat_interleave(C // spec.num_groups, dim=1)
    channel_mean = mean.repeat_interleave(C // spec.num_groups, dim=1)
    gain = gain * channel_rstd
    parts = []
    for rows, R in _batches(h):
        z = torch.batch_norm(
            _view(h[rows], R),
            gain[rows].reshape(-1),
            offset[rows].reshape(-1),
            channel_mean[rows].reshape(-1),
            gain.new_ones(R * C),
            training=False,
            momentum=0.0,
            eps=0.0,
            cudnn_enabled=False,
        )
        parts.append(_unview(z, h))
    return _join(parts, h)


def _finish(z: Tensor, seed: Tensor | None, spec: Spec) -> Tensor:
    """Activation and dropout, in place: z is ours."""
    if spec.activation:
        z = aten.silu_(z)
    if seed is not None and spec.dropout_p > 0:
        z = z.mul_(keep_mask(seed, z, spec.dropout_p))
    return z.to(spec.out_dtype)


@torch.library.custom_op("resblock_bench::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """1/(1 − p) where an element is kept and 0 where it is dropped, the same for the same seed.

    A custom operator because the seed is read on the host, which fake tensors and torch.compile
    cannot follow otherwise. Drawn in logical order, so a mask does not depend on the layout.
    """
    generator = torch.Generator(device=like.device).manual_seed(int(seed.item()))
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    return mask.contiguous(memory_format=memory_format(like))


@keep_mask.register_fake
def _(seed: Tensor, like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like, memory_format=memory_format(like))
