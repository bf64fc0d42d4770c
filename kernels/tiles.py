"""Pieces that the kernels share: addresses, modulation, activation, dropout, folds, a barrier.

Tiles are [channels, positions] in fp32. Which of the two directions is contiguous in memory is in
the strides alone, so one kernel serves both layouts: the stride of 1 is a compile-time constant,
and Triton lays out the tile's threads along it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def strides(C, HW, CHANNELS_LAST: tl.constexpr):
    """Elements from a channel to the next, and from a position to the next."""
    if CHANNELS_LAST:
        stride_c = 1
        stride_hw = C
    else:
        stride_c = HW
        stride_hw = 1
    return stride_c, stride_hw


@triton.jit
def tile_offsets(o_i, o_hw, stride_c, stride_hw):
    """Offsets of a tile from its corner. The corner is an int64 scalar; these fit in int32."""
    return o_i[:, None] * stride_c + o_hw[None, :] * stride_hw


@triton.jit
def load_channels(p_vector, i_n, o_c, m_c, stride_n, ABSENT: tl.constexpr):
    """Row i_n of an (N, C) tensor with contiguous channels, in fp32; ABSENT if there is none."""
    # One return at the end: the compiler goes on past a return inside a branch.
    if p_vector is None:
        b_row = tl.full(o_c.shape, ABSENT, tl.float32)
    else:
        p_row = p_vector + i_n.to(tl.int64) * stride_n
        b_row = tl.load(p_row + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_row


@triton.jit
def load_modulation(p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n):
    """γ' = γ(1 + s) and β' = β(1 + s) + t; 1 + s in fp32."""
    b_weight = load_channels(p_weight, i_n, o_c, m_c, 0, 1.0)
    b_bias = load_channels(p_bias, i_n, o_c, m_c, 0, 0.0)
    b_shift = load_channels(p_shift, i_n, o_c, m_c, shift_n, 0.0)
    one_plus_scale = 1.0 + load_channels(p_scale, i_n, o_c, m_c, scale_n, 0.0)
    return b_weight * one_plus_scale, b_bias * one_plus_scale + b_shift


@triton.jit
def dropout_gain(p_seed, dropout_p, i_n, o_c, o_hw, HW):
    """0 or 1/(1 − p) for every element of a tile.

    Philox keyed by the seed, counting (position within the sample, sample): the value depends on
    the element's logical index alone, not on layout, tier or tile.
    """
    o_element = o_c[:, None] * HW + o_hw[None, :]
    zero = o_element * 0
    bits, _, _, _ = tl.philox(tl.load(p_seed), o_element, zero + i_n.to(tl.int32), zero, zero)
    uniform = tl.uint_to_uniform_float(bits)
    return tl.where(uniform >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def activate(z):
    """SiLU: z·σ(z)."""
    return z * tl.sigmoid(z)


@triton.jit
def activation_gradient(z):
    """dSiLU/dz = σ(1 + z(1 − σ))."""
    sigma = tl.sigmoid(z)
    return sigma * (1.0 + z * (1.0 - sigma))


@triton.jit
def fold_groups(per_channel, o_i, m_c, CG, ONE_GROUP: tl.constexpr):
    """The sum of `per_channel` over the channels of a group: a scalar, or one for every channel."""
    if ONE_GROUP:
        total = tl.sum(tl.where(m_c, per_channel, 0.0), axis=0)
    else:
        same = (o_i[:, None] // CG == o_i[None, :] // CG) & m_c[None, :]
        total = tl.sum(tl.where(same, per_channel[None, :], 0.0), axis=1)
    return total


@triton.jit
def down_channels(per_group, ONE_GROUP: tl.constexpr):
    """What `fold_groups` returns, shaped to broadcast over a tile."""
    return per_group if ONE_GROUP else per_group[:, None]


@triton.jit
def load_statistics(p_mean, p_rstd, i_n, i_slab, o_c, m_c, C, CG, ONE_GROUP: tl.constexpr):
    """Mean and rstd of a slab's group, scalars, or of every channel's group."""
    o_first = i_n.to(tl.int64) * (C // CG)
    if ONE_GROUP:
        mean = tl.load(p_mean + o_first + i_slab)
        rstd = tl.load(p_rstd + o_first + i_slab)
    else:
        mean = tl.load(p_mean + o_first + o_c // CG, mask=m_c, other=0.0)
        rstd = tl.load(p_rstd + o_first + o_c // CG, mask=m_c, other=0.0)
    return mean, rstd


@triton.jit
def load_partials(p_partial, i_n, o_c, m_c, C, splits, BLOCK_S: tl.constexpr):
    """What the programs of all splits stored for these channels: [channels, splits], fp32."""
    o_s = tl.arange(0, BLOCK_S)
    p_first = p_partial + i_n.to(tl.int64) * splits * C
    m_part = m_c[:, None] & (o_s < splits)[None, :]
    # From L2 and never from a multiprocessor's own cache, which other programs do not write to.
    return tl.load(
        p_first + o_s[None, :] * C + o_c[:, None], mask=m_part, other=0.0, cache_modifier=".cg"
    )


@triton.jit
def wait_for(p_barrier, is_first, programs):
    """Return once `programs` programs have come here; what they stored before is then visible.

    A generation-bit barrier: one program adds 2³¹ − (programs − 1) and the others 1, so that the
    top bit flips when the last one comes, and the word is ready for the next round as it stands.
    All the programs must be resident, which is what a cooperative launch makes sure of. (The
    scheme is that of grid synchronisation in CUDA's cooperative groups.)
    """
    tl.debug_barrier()
    step = tl.where(is_first, 2147483647 - programs + 2, 1)
    before = tl.atomic_add(p_barrier, step, sem="acq_rel")
    now = tl.atomic_add(p_barrier, 0, sem="acq_rel")
    while (before ^ now) >= 0:
        now = tl.atomic_add(p_barrier, 0, sem="acq_rel")
    tl.debug_barrier()
