"""Backward kernels: dx and the per-(n, c) sums from which every parameter's gradient follows.

With x̂ = (x − μ)r, z = x̂γ' + β' and dz = dy·dropout·act'(z), all recomputed from x, the sums are
S1 = Σ dz and S2 = Σ dz·x̂ over the positions of a channel, and

    c2 = Σ_{c∈g} γ'S1 / M,   c1 = Σ_{c∈g} γ'S2 / M,   dx = r(γ'dz − c2 − x̂c1).

The pre-norm add needs db = Σ dx = r(γ'S1 − HW·c2 − c1·S3) with S3 = Σ x̂, so it costs no pass.
Tiers as in the forward: `group_backward_kernel` (A, B); `sums_kernel`, `fold_sums_kernel`,
`input_gradient_kernel` (D). No atomics: partial sums have a place of their own, and every sum has
one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resblock_bench.kernels.tiles import (
    activation_gradient,
    dropout_gain,
    fold_groups,
    load_channels,
    load_gain,
    load_offset,
    tile_offsets,
)


@triton.jit
def normalised_and_gradient(
    b_x,
    b_dy,
    m_tile,
    b_mean,
    b_rstd,
    b_gain,
    b_offset,
    p_seed,
    dropout_p,
    i_n,
    o_c,
    o_hw,
    HW,
    ACTIVATION: tl.constexpr,
):
    """x̂ and dz of a tile; both 0 outside it."""
    x_hat = tl.where(m_tile, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
    dz = b_dy
    if p_seed is not None:
        dz *= dropout_gain(p_seed, dropout_p, i_n, o_c, o_hw, HW)
    if ACTIVATION:
        dz *= activation_gradient(x_hat * b_gain[:, None] + b_offset[:, None])
    return x_hat, tl.where(m_tile, dz, 0.0)


@triton.jit
def group_backward_kernel(
    p_dy,
    p_x,
    p_dx,
    p_mean,
    p_rstd,
    p_s1,
    p_s2,
    p_db,
    p_weight,
    p_bias,
    p_scale,
    p_shift,
    p_pre,
    p_seed,
    C,
    HW,
    CG,
    slabs,
    stride_c,
    stride_hw,
    scale_n,
    scale_c,
    shift_n,
    shift_c,
    pre_n,
    pre_c,
    dropout_p,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Program (n, slab): SLAB channels, a whole number of groups, over all positions."""
    i_n = tl.program_id(0) // slabs
    i_slab = tl.program_id(0) % slabs
    o_i = tl.arange(0, BLOCK_C)
    o_j = tl.arange(0, BLOCK_HW)
    o_c = i_slab * SLAB + o_i
    m_c = (o_i < SLAB) & (o_c < C)
    corner = i_n.to(tl.int64) * C * HW + (i_slab * SLAB).to(tl.int64) * stride_c
    o_tile = tile_offsets(o_i, o_j, stride_c, stride_hw)

    o_group = i_n.to(tl.int64) * (C // CG) + o_c // CG
    b_mean = tl.load(p_mean + o_group, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_group, mask=m_c, other=0.0)
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, pre_c, 0.0)
    b_gain = load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c)
    b_offset = load_offset(
        p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, scale_c, shift_n, shift_c
    )

    s1 = tl.zeros([BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_C], tl.float32)
    if RESIDENT:
        m_tile = m_c[:, None] & (o_j < HW)[None, :]
        b_x = tl.load(p_x + corner + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + corner + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        x_hat, dz = normalised_and_gradient(
            b_x + b_pre[:, None], b_dy, m_tile, b_mean, b_rstd, b_gain, b_offset,
            p_seed, dropout_p, i_n, o_c, o_j, HW, ACTIVATION,
        )  # fmt: skip
        s1 += tl.sum(dz, axis=1)
        s2 += tl.sum(dz * x_hat, axis=1)
        s3 += tl.sum(x_hat, axis=1)
    else:
        for hw in range(0, HW, BLOCK_HW):
            m_tile = m_c[:, None] & (hw + o_j < HW)[None, :]
            o_corner = corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
            b_t = tl.load(p_x + o_corner, mask=m_tile, other=0.0, eviction_policy="evict_last")
            b_dt = tl.load(p_dy + o_corner, mask=m_tile, other=0.0, eviction_policy="evict_last")
            t_hat, dz_t = normalised_and_gradient(
                b_t.to(tl.float32) + b_pre[:, None], b_dt.to(tl.float32), m_tile, b_mean, b_rstd,
                b_gain, b_offset, p_seed, dropout_p, i_n, o_c, hw + o_j, HW, ACTIVATION,
            )  # fmt: skip
            s1 += tl.sum(dz_t, axis=1)
            s2 += tl.sum(dz_t * t_hat, axis=1)
            s3 += tl.sum(t_hat, axis=1)

    elements = HW * 1.0 * CG
    c2 = fold_groups(b_gain * s1, o_i, m_c, CG, ONE_GROUP) / elements
    c1 = fold_groups(b_gain * s2, o_i, m_c, CG, ONE_GROUP) / elements
    o_channel = i_n.to(tl.int64) * C + o_c
    tl.store(p_s1 + o_channel, s1, mask=m_c)
    tl.store(p_s2 + o_channel, s2, mask=m_c)
    if p_db is not None:
        tl.store(p_db + o_channel, b_rstd * (b_gain * s1 - c2 * HW - c1 * s3), mask=m_c)

    if RESIDENT:
        b_dx = b_rstd[:, None] * (b_gain[:, None] * dz - c2[:, None] - x_hat * c1[:, None])
        tl.store(p_dx + corner + o_tile, b_dx, mask=m_tile)
    else:
        for hw in range(0, HW, BLOCK_HW):
            m_tile = m_c[:, None] & (hw + o_j < HW)[None, :]
            o_corner = corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
            b_t = tl.load(p_x + o_corner, mask=m_tile, other=0.0, eviction_policy="evict_first")
            b_dt = tl.load(p_dy + o_corner, mask=m_tile, other=0.0, eviction_policy="evict_first")
            t_hat, dz_t = normalised_and_gradient(
                b_t.to(tl.float32) + b_pre[:, None], b_dt.to(tl.float32), m_tile, b_mean, b_rstd,
                b_gain, b_offset, p_seed, dropout_p, i_n, o_c, hw + o_j, HW, ACTIVATION,
            )  # fmt: skip
            b_dx = b_rstd[:, None] * (b_gain[:, None] * dz_t - c2[:, None] - t_hat * c1[:, None])
            tl.store(p_dx + o_corner, b_dx, mask=m_tile)


@triton.jit
def sums_kernel(
    p_dy,
    p_x,
    p_mean,
    p_rstd,
    p_partial_s1,
    p_partial_s2,
    p_partial_s3,
    p_weight,
    p_bias,
    p_scale,
    p_shift,
    p_pre,
    p_seed,
    C,
    HW,
    CG,
    blocks_c,
    splits,
    chunk,
    stride_c,
    stride_hw,
    scale_n,
    scale_c,
    shift_n,
    shift_c,
    pre_n,
    pre_c,
    dropout_p,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Program (n, channel block, split): S1, S2 and, with a pre_shift, S3 over its positions."""
    i_split = tl.program_id(0) % splits
    i_block = tl.program_id(0) // splits % blocks_c
    i_n = tl.program_id(0) // splits // blocks_c
    o_i = tl.arange(0, BLOCK_C)
    o_j = tl.arange(0, BLOCK_HW)
    o_c = i_block * BLOCK_C + o_i
    m_c = o_c < C
    corner = i_n.to(tl.int64) * C * HW + (i_block * BLOCK_C).to(tl.int64) * stride_c
    o_tile = tile_offsets(o_i, o_j, stride_c, stride_hw)

    o_group = i_n.to(tl.int64) * (C // CG) + o_c // CG
    b_mean = tl.load(p_mean + o_group, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_group, mask=m_c, other=0.0)
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, pre_c, 0.0)
    b_gain = load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c)
    b_offset = load_offset(
        p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, scale_c, shift_n, shift_c
    )

    s1 = tl.zeros([BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_C], tl.float32)
    end = tl.minimum(HW, (i_split + 1) * chunk)
    for hw in range(i_split * chunk, end, BLOCK_HW):
        m_tile = m_c[:, None] & (hw + o_j < end)[None, :]
        o_corner = corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
        b_x = tl.load(p_x + o_corner, mask=m_tile, other=0.0).to(tl.float32) + b_pre[:, None]
        b_dy = tl.load(p_dy + o_corner, mask=m_tile, other=0.0).to(tl.float32)
        x_hat, dz = normalised_and_gradient(
            b_x, b_dy, m_tile, b_mean, b_rstd, b_gain, b_offset,
            p_seed, dropout_p, i_n, o_c, hw + o_j, HW, ACTIVATION,
        )  # fmt: skip
        s1 += tl.sum(dz, axis=1)
        s2 += tl.sum(dz * x_hat, axis=1)
        s3 += tl.sum(x_hat, axis=1)
    o_partial = (i_n * splits + i_split).to(tl.int64) * C + o_c
    tl.store(p_partial_s1 + o_partial, s1, mask=m_c)
    tl.store(p_partial_s2 + o_partial, s2, mask=m_c)
    if p_partial_s3 is not None:
        tl.store(p_partial_s3 + o_partial, s3, mask=m_c)


@triton.jit
def fold_sums_kernel(
    p_partial_s1,
    p_partial_s2,
    p_partial_s3,
    p_rstd,
    p_weight,
    p_scale,
    p_s1,
    p_s2,
    p_db,
    p_c1,
    p_c2,
    C,
    HW,
    CG,
    splits,
    scale_n,
    scale_c,
    BLOCK_CG: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (n, g): the splits' sums of each channel, and the group's c1 and c2."""
    i_n = tl.program_id(0) // (C // CG)
    i_g = tl.program_id(0) % (C // CG)
    o_i = tl.arange(0, BLOCK_CG)
    o_s = tl.arange(0, BLOCK_S)
    o_c = i_g * CG + o_i
    m_c = o_i < CG
    m_part = m_c[:, None] & (o_s < splits)[None, :]
    o_row = (i_n * splits).to(tl.int64) * C + i_g * CG
    o_part = o_s[None, :].to(tl.int64) * C + o_i[:, None]
    s1 = tl.sum(tl.load(p_partial_s1 + o_row + o_part, mask=m_part, other=0.0), axis=1)
    s2 = tl.sum(tl.load(p_partial_s2 + o_row + o_part, mask=m_part, other=0.0), axis=1)
    b_gain = load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c)
    elements = HW * 1.0 * CG
    c2 = tl.sum(tl.where(m_c, b_gain * s1, 0.0), axis=0) / elements
    c1 = tl.sum(tl.where(m_c, b_gain * s2, 0.0), axis=0) / elements
    tl.store(p_c1 + tl.program_id(0), c1)
    tl.store(p_c2 + tl.program_id(0), c2)
    o_channel = i_n.to(tl.int64) * C + o_c
    tl.store(p_s1 + o_channel, s1, mask=m_c)
    tl.store(p_s2 + o_channel, s2, mask=m_c)
    if p_db is not None:
        s3 = tl.sum(tl.load(p_partial_s3 + o_row + o_part, mask=m_part, other=0.0), axis=1)
        rstd = tl.load(p_rstd + tl.program_id(0))
        tl.store(p_db + o_channel, rstd * (b_gain * s1 - c2 * HW - c1 * s3), mask=m_c)


@triton.jit
def input_gradient_kernel(
    p_dy,
    p_x,
    p_dx,
    p_mean,
    p_rstd,
    p_c1,
    p_c2,
    p_weight,
    p_bias,
    p_scale,
    p_shift,
    p_pre,
    p_seed,
    C,
    HW,
    CG,
    blocks_c,
    splits,
    chunk,
    stride_c,
    stride_hw,
    scale_n,
    scale_c,
    shift_n,
    shift_c,
    pre_n,
    pre_c,
    dropout_p,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Program (n, channel block, split), last first: dx = r(γ'dz − c2 − x̂c1)."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_split = i % splits
    i_block = i // splits % blocks_c
    i_n = i // splits // blocks_c
    o_i = tl.arange(0, BLOCK_C)
    o_j = tl.arange(0, BLOCK_HW)
    o_c = i_block * BLOCK_C + o_i
    m_c = o_c < C
    corner = i_n.to(tl.int64) * C * HW + (i_block * BLOCK_C).to(tl.int64) * stride_c
    o_tile = tile_offsets(o_i, o_j, stride_c, stride_hw)

    o_group = i_n.to(tl.int64) * (C // CG) + o_c // CG
    b_mean = tl.load(p_mean + o_group, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_group, mask=m_c, other=0.0)
    b_c1 = tl.load(p_c1 + o_group, mask=m_c, other=0.0)
    b_c2 = tl.load(p_c2 + o_group, mask=m_c, other=0.0)
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, pre_c, 0.0)
    b_gain = load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c)
    b_offset = load_offset(
        p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, scale_c, shift_n, shift_c
    )
    end = tl.minimum(HW, (i_split + 1) * chunk)
    for hw in range(i_split * chunk, end, BLOCK_HW):
        m_tile = m_c[:, None] & (hw + o_j < end)[None, :]
        o_corner = corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
        b_x = tl.load(p_x + o_corner, mask=m_tile, other=0.0, eviction_policy="evict_first")
        b_dy = tl.load(p_dy + o_corner, mask=m_tile, other=0.0, eviction_policy="evict_first")
        x_hat, dz = normalised_and_gradient(
            b_x.to(tl.float32) + b_pre[:, None], b_dy.to(tl.float32), m_tile, b_mean, b_rstd,
            b_gain, b_offset, p_seed, dropout_p, i_n, o_c, hw + o_j, HW, ACTIVATION,
        )  # fmt: skip
        b_dx = b_rstd[:, None] * (b_gain[:, None] * dz - b_c2[:, None] - x_hat * b_c1[:, None])
        tl.store(p_dx + o_corner, b_dx, mask=m_tile)
