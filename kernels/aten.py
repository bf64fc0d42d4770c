"""The operator in PyTorch's own kernels: the path of every device and dtype without Triton.

Group norm without scale and shift is the call that eager PyTorch makes. With them it is x̂, whose
affine then differs from sample to sample: z = x̂·γ' + β'. Folded into group norm's own affine that
would be one pass less, but ATen folds the mean into it too, and x·rγ' + (β' − μ·rγ') cancels where
|μ| ≫ σ, in constant groups above all, whose x̂ is exactly 0. Everything that the backward needs is
computed again from x, so nothing but x and the small tensors is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .spec import Modulation, Spec, dense, memory_format, spread

aten = torch.ops.aten


def forward(x: Tensor, modulation: Modulation, seed: Tensor | None, spec: Spec) -> Tensor:
    """y = dropout(act(norm(x + pre_shift)·γ' + β'))."""
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=spec.out_dtype)
    h = _input(x, modulation)
    dtype = _statistics_dtype(h)
    if modulation.after_norm():
        x_hat, _, _ = _group_norm(h, None, None, spec)
        y = _modulated(x_hat, *modulation.folded(x, dtype), memory_format(x), out=x_hat)
    else:
        y, _, _ = _group_norm(h, *_affine(modulation, dtype), spec)
    if spec.activation:
        y = aten.silu_(y)
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
    dtype = _statistics_dtype(h)
    dy = dy.to(h.dtype)
    if seed is not None and spec.dropout_p > 0:
        dy = keep_mask(seed, dy, spec.dropout_p).mul_(dy)
    # Without an affine in fp32, ATen's statistics of 16-bit x have 16 bits.
    if not modulation.after_norm() and (modulation.affine() or h.element_size() >= 4):
        dh, s1, s2 = _backward_about_x(dy, h, modulation, spec, dtype)
    else:
        dh, s1, s2 = _backward_about_x_hat(dy, h, modulation, spec, dtype, memory_format(x))
    db = None
    if modulation.pre_shift is not None:
        db = dh.sum(tuple(range(2, dh.dim())), dtype=dtype)
    return dh.to(x.dtype), (s1, s2, db)


def _input(x: Tensor, modulation: Modulation) -> Tensor:
    """x + pre_shift, in the dtype in which group norm is computed on this device."""
    # On the CPU ATen's group norm reads 16-bit x beside fp32 affine and statistics; elsewhere
    # both must have one dtype. The sum with pre_shift is not rounded to 16 bits.
    if x.element_size() < 4 and (x.device.type != "cpu" or modulation.pre_shift is not None):
        x = x.float()
    if modulation.pre_shift is not None:
        x = dense(x + spread(modulation.pre_shift.to(x.dtype), x), memory_format(x))
    return x


def _statistics_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _affine(modulation: Modulation, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as group norm takes them: contiguous, in the dtype of its statistics."""
    pair = (modulation.weight, modulation.bias)
    weight, bias = (None if t is None else t.to(dtype).contiguous() for t in pair)
    return weight, bias


def _group_norm(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """y, in the layout of h on every device and for fake tensors, mean and rstd."""
    N, C = h.shape[:2]
    y, mean, rstd = aten.native_group_norm(
        h, weight, bias, N, C, h.numel() // (N * C), spec.num_groups, spec.eps
    )
    return _in_layout(y, memory_format(h)), mean, rstd


def _group_norm_backward(
    dz: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, in the layout of h as in `_group_norm`, dweight and dbias. mask: which are wanted."""
    N, C = h.shape[:2]
    dh, dweight, dbias = aten.native_group_norm_backward(
        dz, h, mean, rstd, weight, N, C, h.numel() // (N * C), rstd.shape[1], mask
    )
    return _in_layout(dh, memory_format(h)), dweight, dbias


def _in_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """What ATen made of a dense tensor; it makes contiguous ones from contiguous ones."""
    return y if layout == torch.contiguous_format else dense(y, layout)


def _modulated(
    x_hat: Tensor, gain: Tensor, offset: Tensor, layout: torch.memory_format, out: Tensor
) -> Tensor:
    """x̂·γ' + β' in one pass, into `out`, which may be x̂; both have that layout."""
    if torch.compiler.is_compiling():  # torch 2.6 compiles nothing that writes to an `out`
        return torch.addcmul(spread(offset, x_hat), x_hat, spread(gain, x_hat))
    if layout != torch.contiguous_format:
        # Over contiguous channels PyTorch vectorizes the broadcast product; over positions not.
        return torch.addcmul(spread(offset, x_hat), x_hat, spread(gain, x_hat), out=out)
    # Batch norm's inference form, x̂·γ' + β' at mean 0, variance 0 and eps 1.
    per_channel, zeros = (1, gain.numel(), -1), gain.new_zeros(gain.numel())
    unused = zeros[:0]
    aten.native_batch_norm.out(
        x_hat.view(per_channel),
        gain.view(-1),
        offset.view(-1),
        zeros,
        zeros,
        False,
        0.0,
        1.0,
        out=out.view(per_channel),
        save_mean=unused,
        save_invstd=unused,
    )
    return out


def _silu_backward(dz: Tensor, z: Tensor) -> Tensor:
    """The gradient of z, into z."""
    if torch.compiler.is_compiling():  # as in `_modulated`
        return aten.silu_backward(dz, z)  # type: ignore[no-any-return]
    return aten.silu_backward.grad_input(dz, z, grad_input=z)  # type: ignore[no-any-return]


def _backward_about_x(
    dz: Tensor, h: Tensor, modulation: Modulation, spec: Spec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As eager PyTorch takes it: dx, and S1 and S2 summed over the samples already, (1, C)."""
    weight, bias = _affine(modulation, dtype)
    z, mean, rstd = _group_norm(h, weight, bias, spec)
    if spec.activation:
        dz = _silu_backward(dz, z)
    del z
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # ATen makes the gradients of both in the likeness of weight
    affine = weight is not None
    dh, s2, s1 = _group_norm_backward(dz, h, mean, rstd, weight, [True, affine, affine])
    if not affine:
        s1 = s2 = mean.new_zeros(h.shape[1])
    return dh, s1[None], s2[None]


def _backward_about_x_hat(
    dz: Tensor,
    h: Tensor,
    modulation: Modulation,
    spec: Spec,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """About the normalised x̂, whose mean is 0 and rstd 1: dx, S1 and S2.

    Eager takes the gradient of scale from the normalised activation; about x, ATen's sums would
    cancel where |mean| ≫ std and that gradient be less accurate than eager's. dx is linear in the
    gain, so the true rstd goes there. N samples of C channels in G groups are one sample of N·C
    channels in N·G groups, so that the gain may differ from sample to sample; channels-last tensors
    cannot be viewed so and go sample by sample. A compiler takes the number of groups for a
    constant, which N·G must not be, and fuses what would be passes of their own.
    """
    N, C = h.shape[:2]
    gain, offset = modulation.folded(h, dtype)
    x_hat, _, rstd = _group_norm(h, None, None, spec)
    if rstd.dtype != dtype:
        _, _, rstd = _group_norm(h, gain.new_ones(C), None, spec)
    if spec.activation:
        z = _modulated(x_hat, gain, offset, layout, out=torch.empty_like(x_hat))
        dz = _silu_backward(dz, z)
        del z
    gain = (gain.view(*rstd.shape, -1) * rstd[..., None]).view(N, C)
    if torch.compiler.is_compiling():
        x_hat, dz = x_hat.to(dtype), dz.to(dtype)
        zeros, ones, weighted = torch.zeros_like(rstd), torch.ones_like(rstd), dz * spread(gain, dz)
        dh, _, _ = _group_norm_backward(weighted, x_hat, zeros, ones, None, [True, False, False])
        positions = tuple(range(2, dz.dim()))
        return dh, dz.sum(positions), (dz * x_hat).sum(positions)
    parts = []
    for part, part_dz, part_gain in _calls(x_hat, dz, gain, layout):
        groups = part.shape[1] * spec.num_groups // C
        zeros, ones = rstd.new_zeros((1, groups)), rstd.new_ones((1, groups))
        parts.append(_group_norm_backward(part_dz, part, zeros, ones, part_gain, [True] * 3))
    dh, s2, s1 = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
    return _in_layout(dh.view(h.shape), layout), s1.view(N, C), s2.view(N, C)


def _calls(
    x_hat: Tensor, dz: Tensor, gain: Tensor, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What one call of ATen takes of each: all samples as one, or each in turn."""
    if layout == torch.contiguous_format:
        yield x_hat.view(1, gain.numel(), -1), dz.view(1, gain.numel(), -1), gain.view(-1)
    else:
        for n in range(len(gain)):
            yield x_hat[n : n + 1], dz[n : n + 1], gain[n]


def keep_mask(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """1/(1 − p) where an element is kept and 0 where it is dropped, the same for the same seed."""
    # Calling an operator that is written in Python takes as long as the mask of a small map.
    if not torch.compiler.is_compiling() and type(seed) is type(like) is Tensor and not _modes():
        return _drawn(seed, like, p)
    mask: Tensor = _keep_mask(seed, like, p)
    return mask


def _drawn(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """The mask, drawn in logical order, so that it does not depend on the layout."""
    generator = torch.Generator(device=like.device).manual_seed(int(seed.item()))
    # Four elements to a 64-bit draw: on the CPU the mask so costs an eighth of F.dropout's, and it
    # is drawn again where F.dropout's is kept. p is met to within 2⁻¹⁶.
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    uniform = draws.view(torch.int16)[: like.numel()].view(like.shape)
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    # Into the mask's own dtype: a comparison to booleans, and these to numbers, is not vectorized.
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    torch.ge(uniform, threshold, out=mask).mul_(1 / (1 - p))
    return _in_layout(mask, memory_format(like))


# An operator for what cannot follow a read of the seed on the host: fake tensors, torch.compile.
_keep_mask = torch.library.custom_op("resblock_bench::keep_mask", _drawn, mutates_args=())
_modes = torch._C._len_torch_dispatch_stack


@_keep_mask.register_fake
def _(seed: Tensor, like: Tensor, p: float) -> Tensor:
    return dense(torch.empty_like(like), memory_format(like))
