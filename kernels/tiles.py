"""Pieces that every kernel shares: addresses, modulation, activation, dropout.

All of them work on a tile [BLOCK_C channels, BLOCK_HW positions] in fp32. Which of the two
directions is contiguous in memory is in the strides alone, so one kernel serves both layouts: the
stride that equals 1 is a compile-time constant, and Triton lays out the tile's threads along it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(
    o_i,
    o_hw,
    stride_c,
    stride_hw,
):
    """Offsets of a tile from its corner. The corner is an int64 scalar; these fit in int32."""
    return o_i[:, None] * stride_c + o_hw[None, :] * stride_hw


@triton.jit
def load_channels(p_vector, i_n, o_c, m_c, stride_n, stride_c, ABSENT: tl.constexpr):
    """Row i_n of an (N, C) tensor with any strides, in fp32; ABSENT where there is no tensor."""
    # One return at the end: the compiler goes on past a return inside a branch.
    if p_vector is None:
        b_row = tl.full(o_c.shape, ABSENT, tl.float32)
    else:
        p_row = p_vector + i_n.to(tl.int64) * stride_n
        b_row = tl.load(p_row + o_c * stride_c, mask=m_c, other=0.0).to(tl.float32)
    return b_row


@triton.jit
def load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c):
    """γ' = γ(1 + s); 1 + s in fp32."""
    b_weight = load_channels(p_weight, i_n, o_c, m_c, 0, 1, 1.0)
    b_scale = load_channels(p_scale, i_n, o_c, m_c, scale_n, scale_c, 0.0)
    return b_weight * (1.0 + b_scale)


@triton.jit
def load_offset(p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, scale_c, shift_n, shift_c):
    """β' = β(1 + s) + t."""
    b_bias = load_channels(p_bias, i_n, o_c, m_c, 0, 1, 0.0)
    b_scale = load_channels(p_scale, i_n, o_c, m_c, scale_n, scale_c, 0.0)
    b_shift = load_channels(p_shift, i_n, o_c, m_c, shift_n, shift_c, 0.0)
    return b_bias * (1.0 + b_scale) + b_shift


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
    """For every channel of a slab, the sum of `per_channel` over the channels of its group."""
    if ONE_GROUP:
        total = tl.zeros_like(per_channel) + tl.sum(tl.where(m_c, per_channel, 0.0), axis=0)
    else:
        same = (o_i[:, None] // CG == o_i[None, :] // CG) & m_c[None, :]
        total = tl.sum(tl.where(same, per_channel[None, :], 0.0), axis=1)
    return total
