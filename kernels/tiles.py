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
def within(m_c, o_hw, end, EVEN: tl.constexpr):
    """The mask of a tile; EVEN where no tile reaches past `end`."""
    return m_c[:, None] if EVEN else m_c[:, None] & (o_hw < end)[None, :]


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
def load_seed(p_seed):
    """The seed, or None without dropout. Loaded here, since compilers leave it in the loops."""
    return p_seed if p_seed is None else tl.load(p_seed)


@triton.jit
def dropout_gain(seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW: tl.constexpr):
    """0 or 1/(1 − p) for every element of the tile whose positions begin at `hw`.

    Philox, keyed by the seed and counting (channel, position / 4) and the sample, gives four
    positions their bits at once. The value depends on the element's logical index alone, not on
    layout, tier or tile: `hw` and BLOCK_HW are multiples of 4.
    """
    o_quad = o_c[:, None] * tl.cdiv(HW, 4) + hw // 4 + tl.arange(0, BLOCK_HW // 4)[None, :]
    zero = o_quad * 0
    r0, r1, r2, r3 = tl.philox(seed, o_quad, zero + i_n.to(tl.int32), zero, zero)
    # [c, j] ×4 → [c, j, 2, 2] → [c, 4j + lane].
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(o_c.shape[0], BLOCK_HW)
    dropped = tl.cast(dropout_p * 4294967296.0, tl.uint32)
    return tl.where(bits >= dropped, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def sigmoid(z):
    """1/(1 + e⁻ᶻ). By exp2: tl.exp compiles to the same and four instructions for subnormals."""
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def activate(z):
    """SiLU: z·σ(z)."""
    return z * sigmoid(z)


@triton.jit
def activation_gradient(z):
    """dSiLU/dz = σ + zσ(1 − σ)."""
    sigma = sigmoid(z)
    return sigma + z * sigma * (1.0 - sigma)


@triton.jit
def fold_groups(per_channel, o_i, m_c, CG: tl.constexpr, BLOCK_G: tl.constexpr):
    """The sum of `per_channel` over the channels of a group.

    A scalar where the slab is one group; else one for every channel, of at most BLOCK_G groups.
    """
    if BLOCK_G == 1:
        total = tl.sum(tl.where(m_c, per_channel, 0.0), axis=0)
    else:
        # Any C/G: down to the groups and up to the channels again through [channel, group].
        o_g = tl.arange(0, BLOCK_G)
        member = (o_i[:, None] // CG == o_g[None, :]) & m_c[:, None]
        of_group = tl.sum(tl.where(member, per_channel[:, None], 0.0), axis=0)
        total = tl.sum(tl.where(member, of_group[None, :], 0.0), axis=1)
    return total


@triton.jit
def down_channels(per_group, BLOCK_G: tl.constexpr):
    """What `fold_groups` returns, shaped to broadcast over a tile."""
    return per_group if BLOCK_G == 1 else per_group[:, None]


@triton.jit
def load_statistics(
    p_mean, p_rstd, i_n, i_slab, o_c, m_c, C, CG: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Mean and rstd of a slab's group, scalars, or of every channel's group."""
    o_first = i_n.to(tl.int64) * (C // CG)
    if BLOCK_G == 1:
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
