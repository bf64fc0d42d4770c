"""Forward kernel: group norm, modulation, SiLU and dropout.

One kernel, in phases that a launch picks (docs/kernels.md):

    "whole"        a program owns a unit: statistics and output in one go (tiers A and B)
    "statistics"   a program stores mean and M2 of its part of a unit (C and D, first launch)
    "apply"        it folds what all parts stored and writes its part of the output (second launch)
    "cooperative"  both in one launch, programs waiting for each other between the two (C)
    "rewrite"      the output once more, from saved statistics

Statistics are centred: Welford's update over the tiles, lane by lane, and Chan's merge of lanes,
splits and channels. E[x²] − μ² is used nowhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resblock_bench.kernels.tiles import (
    activate,
    down_channels,
    dropout_gain,
    fold_groups,
    load_channels,
    load_modulation,
    load_partials,
    load_seed,
    load_statistics,
    strides,
    tile_offsets,
    wait_for,
    within,
)


@triton.jit
def merge_lanes(mean, m2, o_j, size, BLOCK_HW: tl.constexpr, EVEN: tl.constexpr):
    """Chan's merge of what every lane [channel, position mod BLOCK_HW] saw of `size` positions."""
    if EVEN:
        counts = size // BLOCK_HW * 1.0
        merged = tl.sum(mean, axis=1) / BLOCK_HW
    else:
        counts = (tl.maximum(size - o_j + BLOCK_HW - 1, 0) // BLOCK_HW * 1.0)[None, :]
        merged = tl.sum(mean * counts, axis=1) / size
    deviation = mean - merged[:, None]
    return merged, tl.sum(m2 + deviation * deviation * counts, axis=1)


@triton.jit
def merge_splits(b_mean, b_m2, m_c, HW, splits, chunk, BLOCK_S: tl.constexpr):
    """Chan's merge of [channels, splits] into per-channel mean and M2."""
    o_s = tl.arange(0, BLOCK_S)
    m_part = m_c[:, None] & (o_s < splits)[None, :]
    counts = (tl.minimum(HW - o_s * chunk, chunk) * 1.0)[None, :]  # the last may hold less
    mean = tl.sum(tl.where(m_part, b_mean * counts, 0.0), axis=1) / HW
    deviation = b_mean - mean[:, None]
    m2 = tl.sum(tl.where(m_part, b_m2 + deviation * deviation * counts, 0.0), axis=1)
    return mean, m2


@triton.jit
def merge_channels(mean, m2, o_i, m_c, HW, CG: tl.constexpr, eps, BLOCK_G: tl.constexpr):
    """Chan's merge of per-channel mean and M2, HW elements each, into the groups' mean and rstd."""
    group_mean = fold_groups(mean, o_i, m_c, CG, BLOCK_G) / CG
    deviation = mean - group_mean
    group_m2 = fold_groups(m2 + deviation * deviation * HW, o_i, m_c, CG, BLOCK_G)
    return group_mean, 1.0 / tl.sqrt(group_m2 / (HW * 1.0 * CG) + eps)


@triton.jit
def write_tile(
    p_y, b_x, m_tile, mean, gain, offset, seed, dropout_p, i_n, o_c, hw, HW,
    BLOCK_HW: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = dropout(act((x − μ)·rγ' + β')), of a tile."""
    b_y = (b_x - mean) * gain + offset
    if ACTIVATION:
        b_y = activate(b_y)
    if seed is not None:
        b_y *= dropout_gain(seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW)
    tl.store(p_y, b_y, mask=m_tile)


@triton.jit
def forward_unit(
    i_unit, i_slot, i_part, parts, p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift,
    p_pre, p_seed, p_partial_mean, p_partial_m2, p_barrier, C, HW, splits, chunk, scale_n, shift_n,
    pre_n, eps, dropout_p, PHASE: tl.constexpr, CG: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RESIDENT: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Part (channel block, split) of unit (n, slab)."""
    stride_c, stride_hw = strides(C, HW, CHANNELS_LAST)
    slabs = tl.cdiv(C, SLAB)
    i_n = i_unit // slabs
    i_slab = i_unit % slabs
    i_split = i_part % splits
    o_i = i_part // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    o_j = tl.arange(0, BLOCK_HW)
    o_c = i_slab * SLAB + o_i
    m_c = (o_i < SLAB) & (o_c < C)
    i_c = i_slab * SLAB + i_part // splits * BLOCK_C
    corner = i_n.to(tl.int64) * C * HW + i_c.to(tl.int64) * stride_c
    o_tile = tile_offsets(tl.arange(0, BLOCK_C), o_j, stride_c, stride_hw)
    begin = i_split * chunk
    end = tl.minimum(HW, begin + chunk)
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, 0.0)
    seed = load_seed(p_seed)

    if PHASE == "whole" or PHASE == "statistics" or PHASE == "cooperative":
        lane_m2 = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
        if RESIDENT:
            m_tile = within(m_c, o_j, HW, EVEN)
            b_x = tl.load(p_x + corner + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_x += b_pre[:, None]
            lane_mean = b_x
        else:
            # Welford's update, lane by lane: no lane waits for another before the last tile.
            lane_mean = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
            count = 0.0
            for hw in range(begin, end, BLOCK_HW):
                p_tile = p_x + corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
                m_t = within(m_c, hw + o_j, end, EVEN)
                b_t = tl.load(p_tile, mask=m_t, other=0.0, eviction_policy="evict_last")
                b_t = b_t.to(tl.float32) + b_pre[:, None]
                count += 1.0
                delta = b_t - lane_mean
                if not EVEN:
                    delta = tl.where(m_t, delta, 0.0)
                lane_mean += delta * (1.0 / count)
                lane_m2 += delta * (b_t - lane_mean)
        mean, m2 = merge_lanes(lane_mean, lane_m2, o_j, end - begin, BLOCK_HW, EVEN)
        if PHASE != "whole":
            o_partial = (i_n.to(tl.int64) * splits + i_split) * C + o_c
            tl.store(p_partial_mean + o_partial, mean, mask=m_c)
            tl.store(p_partial_m2 + o_partial, m2, mask=m_c)

    if PHASE == "cooperative":
        wait_for(p_barrier + i_slot, i_part == 0, parts)

    if PHASE != "statistics":
        # The channels of the whole slab, of which a part may have some.
        o_k = tl.arange(0, BLOCK_SLAB)
        o_slab = i_slab * SLAB + o_k
        m_slab = (o_k < SLAB) & (o_slab < C)
        o_group = i_n.to(tl.int64) * (C // CG) + o_slab // CG
        if PHASE == "rewrite":
            group_mean, rstd = load_statistics(
                p_mean, p_rstd, i_n, i_slab, o_slab, m_slab, C, CG, BLOCK_G
            )
        else:
            if PHASE != "whole":
                b_mean = load_partials(p_partial_mean, i_n, o_slab, m_slab, C, splits, BLOCK_S)
                b_m2 = load_partials(p_partial_m2, i_n, o_slab, m_slab, C, splits, BLOCK_S)
                mean, m2 = merge_splits(b_mean, b_m2, m_slab, HW, splits, chunk, BLOCK_S)
            group_mean, rstd = merge_channels(mean, m2, o_k, m_slab, HW, CG, eps, BLOCK_G)
            m_first = m_slab & (o_k % CG == 0) & (i_part == 0)
            tl.store(p_mean + o_group, group_mean, mask=m_first)
            tl.store(p_rstd + o_group, rstd, mask=m_first)

        b_gain, b_offset = load_modulation(
            p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
        )
        gain = (b_gain * rstd)[:, None]
        offset = b_offset[:, None]
        column = down_channels(group_mean, BLOCK_G)
        if RESIDENT:
            write_tile(
                p_y + corner + o_tile, b_x, m_tile, column, gain, offset,
                seed, dropout_p, i_n, o_c, 0, HW, BLOCK_HW, ACTIVATION,
            )  # fmt: skip
        else:
            for hw in range(begin, end, BLOCK_HW):
                m_t = within(m_c, hw + o_j, end, EVEN)
                o_corner = corner + tl.cast(hw, tl.int64) * stride_hw
                b_t = tl.load(
                    p_x + o_corner + o_tile, mask=m_t, other=0.0, eviction_policy="evict_first"
                )
                write_tile(
                    p_y + o_corner + o_tile, b_t.to(tl.float32) + b_pre[:, None], m_t, column,
                    gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, ACTIVATION,
                )  # fmt: skip


@triton.jit
def forward_kernel(
    p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, p_partial_mean,
    p_partial_m2, p_barrier, C, HW, splits, chunk, first, end, scale_n, shift_n, pre_n, eps,
    dropout_p, PHASE: tl.constexpr, CG: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RESIDENT: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Units first … end − 1, one program a part; a cooperative grid goes round until the end."""
    parts = tl.cdiv(SLAB, BLOCK_C) * splits
    i_program = tl.program_id(0)
    if PHASE == "apply":
        # Last first: what was read last is still in L2.
        i_program = tl.num_programs(0) - 1 - i_program
    i_slot = i_program // parts
    i_part = i_program % parts
    if PHASE == "cooperative":
        for i_unit in range(first + i_slot, end, tl.num_programs(0) // parts):
            forward_unit(
                i_unit, i_slot, i_part, parts, p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale,
                p_shift, p_pre, p_seed, p_partial_mean, p_partial_m2, p_barrier, C, HW, splits,
                chunk, scale_n, shift_n, pre_n, eps, dropout_p, PHASE, CG, SLAB, BLOCK_SLAB,
                BLOCK_C, BLOCK_HW, BLOCK_S, BLOCK_G, CHANNELS_LAST, RESIDENT, EVEN, ACTIVATION,
            )  # fmt: skip
    else:
        forward_unit(
            first + i_slot, i_slot, i_part, parts, p_x, p_y, p_mean, p_rstd, p_weight, p_bias,
            p_scale, p_shift, p_pre, p_seed, p_partial_mean, p_partial_m2, p_barrier, C, HW,
            splits, chunk, scale_n, shift_n, pre_n, eps, dropout_p, PHASE, CG, SLAB, BLOCK_SLAB,
            BLOCK_C, BLOCK_HW, BLOCK_S, BLOCK_G, CHANNELS_LAST, RESIDENT, EVEN, ACTIVATION,
        )  # fmt: skip
