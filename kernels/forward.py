"""Forward kernels: group norm, modulation, SiLU and dropout in one read of x where it fits.

Two ways over the activation (docs/kernels.md). `group_forward_kernel` gives whole groups to one
program, which keeps them in registers (tier A) or reads them twice, the second time from L2
(tier B). `statistics_kernel`, `fold_statistics_kernel` and `apply_kernel` split a group over many
programs (tier D); `apply_kernel` alone rewrites an output from saved statistics.

Statistics are centred: every tile takes squares about its own mean, and tiles, channels and splits
are merged with Chan's formula. E[x²] − μ² is used nowhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resblock_bench.kernels.tiles import (
    activate,
    dropout_gain,
    fold_groups,
    load_channels,
    load_gain,
    load_offset,
    tile_offsets,
)


@triton.jit
def merge_tile(b_x, m_tile, tile_count, mean, m2, count):
    """Chan's update of per-channel (mean, M2, count) by one tile."""
    tile_mean = tl.sum(tl.where(m_tile, b_x, 0.0), axis=1) / tile_count
    deviation = tl.where(m_tile, b_x - tile_mean[:, None], 0.0)
    tile_m2 = tl.sum(deviation * deviation, axis=1)
    total = count + tile_count
    delta = tile_mean - mean
    mean += delta * (tile_count / total)
    m2 += tile_m2 + delta * delta * (count * tile_count / total)
    return mean, m2, total


@triton.jit
def group_forward_kernel(
    p_x,
    p_y,
    p_mean,
    p_rstd,
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
    eps,
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
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, pre_c, 0.0)

    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    if RESIDENT:
        m_tile = m_c[:, None] & (o_j < HW)[None, :]
        b_x = tl.load(p_x + corner + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_x += b_pre[:, None]
        mean, m2, count = merge_tile(b_x, m_tile, HW * 1.0, mean, m2, count)
    else:
        for hw in range(0, HW, BLOCK_HW):
            m_tile = m_c[:, None] & (hw + o_j < HW)[None, :]
            p_tile = p_x + corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
            b_t = tl.load(p_tile, mask=m_tile, other=0.0, eviction_policy="evict_last")
            b_t = b_t.to(tl.float32) + b_pre[:, None]
            tile_count = tl.minimum(HW - hw, BLOCK_HW) * 1.0
            mean, m2, count = merge_tile(b_t, m_tile, tile_count, mean, m2, count)

    # Chan's merge over the channels of each group; all channels hold HW elements.
    group_mean = fold_groups(mean, o_i, m_c, CG, ONE_GROUP) / CG
    deviation = mean - group_mean
    group_m2 = fold_groups(m2 + deviation * deviation * HW, o_i, m_c, CG, ONE_GROUP)
    rstd = 1.0 / tl.sqrt(group_m2 / (HW * 1.0 * CG) + eps)
    m_first = m_c & (o_i % CG == 0)
    o_group = i_n.to(tl.int64) * (C // CG) + o_c // CG
    tl.store(p_mean + o_group, group_mean, mask=m_first)
    tl.store(p_rstd + o_group, rstd, mask=m_first)

    b_gain = load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c) * rstd
    b_offset = load_offset(
        p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, scale_c, shift_n, shift_c
    )
    if RESIDENT:
        b_y = (b_x - group_mean[:, None]) * b_gain[:, None] + b_offset[:, None]
        if ACTIVATION:
            b_y = activate(b_y)
        if p_seed is not None:
            b_y *= dropout_gain(p_seed, dropout_p, i_n, o_c, o_j, HW)
        tl.store(p_y + corner + o_tile, b_y, mask=m_tile)
    else:
        for hw in range(0, HW, BLOCK_HW):
            m_tile = m_c[:, None] & (hw + o_j < HW)[None, :]
            o_corner = corner + tl.cast(hw, tl.int64) * stride_hw
            b_t = tl.load(
                p_x + o_corner + o_tile, mask=m_tile, other=0.0, eviction_policy="evict_first"
            )
            b_t = b_t.to(tl.float32) + b_pre[:, None]
            b_y = (b_t - group_mean[:, None]) * b_gain[:, None] + b_offset[:, None]
            if ACTIVATION:
                b_y = activate(b_y)
            if p_seed is not None:
                b_y *= dropout_gain(p_seed, dropout_p, i_n, o_c, hw + o_j, HW)
            tl.store(p_y + o_corner + o_tile, b_y, mask=m_tile)


@triton.jit
def statistics_kernel(
    p_x,
    p_pre,
    p_partial_mean,
    p_partial_m2,
    C,
    HW,
    blocks_c,
    splits,
    chunk,
    stride_c,
    stride_hw,
    pre_n,
    pre_c,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    """Program (n, channel block, split): mean and M2 of each channel over `chunk` positions."""
    i_split = tl.program_id(0) % splits
    i_block = tl.program_id(0) // splits % blocks_c
    i_n = tl.program_id(0) // splits // blocks_c
    o_i = tl.arange(0, BLOCK_C)
    o_j = tl.arange(0, BLOCK_HW)
    o_c = i_block * BLOCK_C + o_i
    m_c = o_c < C
    corner = i_n.to(tl.int64) * C * HW + (i_block * BLOCK_C).to(tl.int64) * stride_c
    o_tile = tile_offsets(o_i, o_j, stride_c, stride_hw)
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, pre_c, 0.0)

    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    end = tl.minimum(HW, (i_split + 1) * chunk)
    for hw in range(i_split * chunk, end, BLOCK_HW):
        m_tile = m_c[:, None] & (hw + o_j < end)[None, :]
        p_tile = p_x + corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
        b_x = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32) + b_pre[:, None]
        tile_count = tl.minimum(end - hw, BLOCK_HW) * 1.0
        mean, m2, count = merge_tile(b_x, m_tile, tile_count, mean, m2, count)
    o_partial = (i_n * splits + i_split).to(tl.int64) * C + o_c
    tl.store(p_partial_mean + o_partial, mean, mask=m_c)
    tl.store(p_partial_m2 + o_partial, m2, mask=m_c)


@triton.jit
def fold_statistics_kernel(
    p_partial_mean,
    p_partial_m2,
    p_mean,
    p_rstd,
    C,
    HW,
    CG,
    splits,
    chunk,
    eps,
    BLOCK_CG: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (n, g): Chan's merge of the group's channels and splits into mean and rstd."""
    i_n = tl.program_id(0) // (C // CG)
    i_g = tl.program_id(0) % (C // CG)
    o_i = tl.arange(0, BLOCK_CG)
    o_s = tl.arange(0, BLOCK_S)
    m_part = (o_i < CG)[:, None] & (o_s < splits)[None, :]
    o_row = (i_n * splits).to(tl.int64) * C + i_g * CG
    o_part = o_s[None, :].to(tl.int64) * C + o_i[:, None]
    b_mean = tl.load(p_partial_mean + o_row + o_part, mask=m_part, other=0.0)
    b_m2 = tl.load(p_partial_m2 + o_row + o_part, mask=m_part, other=0.0)
    # What each split holds of a channel; the last one may hold less.
    counts = (tl.minimum(HW - o_s * chunk, chunk) * 1.0)[None, :]
    elements = HW * 1.0 * CG
    mean = tl.sum(tl.sum(tl.where(m_part, b_mean * counts, 0.0), axis=1), axis=0) / elements
    deviation = b_mean - mean
    m2 = tl.sum(
        tl.sum(tl.where(m_part, b_m2 + deviation * deviation * counts, 0.0), axis=1), axis=0
    )
    tl.store(p_mean + tl.program_id(0), mean)
    tl.store(p_rstd + tl.program_id(0), 1.0 / tl.sqrt(m2 / elements + eps))


@triton.jit
def apply_kernel(
    p_x,
    p_y,
    p_mean,
    p_rstd,
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
    """Program (n, channel block, split), last first: what was read last is still in L2."""
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
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, pre_c, 0.0)

    o_group = i_n.to(tl.int64) * (C // CG) + o_c // CG
    b_mean = tl.load(p_mean + o_group, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_group, mask=m_c, other=0.0)
    b_gain = load_gain(p_weight, p_scale, i_n, o_c, m_c, scale_n, scale_c) * b_rstd
    b_offset = load_offset(
        p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, scale_c, shift_n, shift_c
    )
    end = tl.minimum(HW, (i_split + 1) * chunk)
    for hw in range(i_split * chunk, end, BLOCK_HW):
        m_tile = m_c[:, None] & (hw + o_j < end)[None, :]
        o_corner = corner + tl.cast(hw, tl.int64) * stride_hw
        b_x = tl.load(
            p_x + o_corner + o_tile, mask=m_tile, other=0.0, eviction_policy="evict_first"
        )
        b_x = b_x.to(tl.float32) + b_pre[:, None]
        b_y = (b_x - b_mean[:, None]) * b_gain[:, None] + b_offset[:, None]
        if ACTIVATION:
            b_y = activate(b_y)
        if p_seed is not None:
            b_y *= dropout_gain(p_seed, dropout_p, i_n, o_c, hw + o_j, HW)
        tl.store(p_y + o_corner + o_tile, b_y, mask=m_tile)
