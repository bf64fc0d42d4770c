"""Forward kernel: group norm, modulation, SiLU and dropout.

One kernel, in phases that a launch picks (docs/kernels.md):

    "resident"   a program owns a unit and holds it in registers (tier A)
    "whole"      a program owns a unit and reads it twice (tier B)
    "split"      a program draws the statistics of a part of a unit, or its output (C, D)
    "rewrite"    the output once more, from saved statistics

Statistics are centred: Welford's update over the tiles, lane by lane, and Chan's merge of lanes,
channels and parts. E[x²] − μ² is used nowhere. Every mean is corrected by the mean of the
deviations from it, so that the mean of equal numbers is that number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    activate,
    arrive,
    corner_of,
    draw_ticket,
    dropout_gain,
    fold_groups,
    leave,
    load_channels,
    load_group_parts,
    load_groups,
    load_modulation,
    load_tile,
    store_group_parts,
    store_tile,
    strides,
    tile_offsets,
    unit_groups,
    wait_until,
    within,
    work_of,
)


@triton.jit
def merge_lanes(mean, m2, o_j, size, BLOCK_HW: tl.constexpr, EVEN: tl.constexpr):
    """Chan's merge of what every lane [channel, position mod BLOCK_HW] saw of `size` positions."""
    if EVEN:
        counts = size // BLOCK_HW * 1.0
        merged = tl.sum(mean, axis=1) / BLOCK_HW
        deviation = mean - merged[:, None]
        merged += tl.sum(deviation, axis=1) / BLOCK_HW
    else:
        counts = (tl.maximum(size - o_j + BLOCK_HW - 1, 0) // BLOCK_HW * 1.0)[None, :]
        merged = tl.sum(mean * counts, axis=1) / size
        deviation = mean - merged[:, None]
        merged += tl.sum(deviation * counts, axis=1) / size
    return merged, tl.sum(m2 + deviation * deviation * counts, axis=1)


@triton.jit
def merge_channels(mean, m2, o_i, m_c, size, channels, CG: tl.constexpr, BLOCK_G: tl.constexpr):
    """Chan's merge of per-channel mean and M2, `size` elements each, into those of the groups.

    channels: how many of a group there are, C/G or a part of them.
    """
    group_mean = fold_groups(mean, o_i, m_c, CG, BLOCK_G) / channels
    deviation = mean - group_mean
    group_mean += fold_groups(deviation, o_i, m_c, CG, BLOCK_G) / channels
    return group_mean, fold_groups(m2 + deviation * deviation * size, o_i, m_c, CG, BLOCK_G)


@triton.jit
def merge_parts(
    p_partial_mean, p_partial_m2, i_unit, parts, HW, splits, chunk, CG: tl.constexpr,
    SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Chan's merge of what the parts of a unit stored, in their order: mean and M2, [BLOCK_G]."""
    lane_mean = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    lane_m2 = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    sizes = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, parts, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        b_mean = load_group_parts(p_partial_mean, i_unit, o_s, parts, CG, SLAB, BLOCK_G)
        b_m2 = load_group_parts(p_partial_m2, i_unit, o_s, parts, CG, SLAB, BLOCK_G)
        size = tl.minimum(HW - o_s % splits * chunk, chunk)  # the last may hold less
        if BLOCK_G == 1:
            size *= tl.minimum(SLAB - o_s // splits * BLOCK_C, BLOCK_C)
        else:
            size *= CG
        size = tl.where(o_s < parts, size * 1.0, 0.0)
        share = (size / tl.maximum(sizes + size, 1.0))[None, :]
        delta = b_mean - lane_mean
        lane_mean += delta * share
        lane_m2 += b_m2 + delta * delta * (sizes[None, :] * share)
        sizes += size
    total = HW * 1.0 * CG
    mean = tl.sum(lane_mean * sizes[None, :], axis=1) / total
    deviation = lane_mean - mean[:, None]
    mean += tl.sum(deviation * sizes[None, :], axis=1) / total
    return mean, tl.sum(lane_m2 + deviation * deviation * sizes[None, :], axis=1)


@triton.jit
def statistics_of(
    p_x, m_c, begin, end, stride_hw, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    EVEN: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Per-channel mean and M2 of positions begin … end − 1. p_x: the tile at `begin`."""
    o_j = tl.arange(0, BLOCK_HW)
    # Welford's update, lane by lane: no lane waits for another before the last tile.
    lane_mean = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
    lane_m2 = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
    count = 0.0
    for hw in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        b_t = load_tile(
            p_x + (hw - begin) * stride_hw, m_c, hw + o_j, end, EVEN, FULL, "evict_last"
        )
        count += 1.0
        delta = b_t - lane_mean
        if not EVEN:
            delta = tl.where((hw + o_j < end)[None, :], delta, 0.0)
        lane_mean += delta * (1.0 / count)
        lane_m2 += delta * (b_t - lane_mean)
    return merge_lanes(lane_mean, lane_m2, o_j, end - begin, BLOCK_HW, EVEN)


@triton.jit
def resident_statistics(
    b_x, b_pre, o_i, o_j, m_c, HW, CG: tl.constexpr, BLOCK_G: tl.constexpr, EVEN: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of the groups in a tile that holds all of them, as `merge_channels` returns."""
    if BLOCK_G == 1:
        # All at once: sums over one channel after another would take most of the instructions.
        b_h = b_x + b_pre[:, None]
        if not (EVEN and FULL):
            b_h = tl.where(within(m_c, o_j, HW, EVEN, FULL), b_h, 0.0)
        mean = tl.sum(b_h) / (HW * 1.0 * CG)
        deviation = b_h - mean
        if not (EVEN and FULL):
            deviation = tl.where(within(m_c, o_j, HW, EVEN, FULL), deviation, 0.0)
        mean += tl.sum(deviation) / (HW * 1.0 * CG)
        m2 = tl.sum(deviation * deviation)
    else:
        of_channel = tl.sum(b_x, axis=1) / HW
        deviation = b_x - of_channel[:, None]
        if not EVEN:
            deviation = tl.where((o_j < HW)[None, :], deviation, 0.0)
        of_channel += tl.sum(deviation, axis=1) / HW
        squares = tl.sum(deviation * deviation, axis=1)
        mean, m2 = merge_channels(of_channel + b_pre, squares, o_i, m_c, HW, CG, CG, BLOCK_G)
    return mean, m2


@triton.jit
def output_of(
    b_x, centre, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = dropout(act((x − μ)·rγ' + β')), of a tile."""
    b_y = (b_x - centre) * gain + offset
    if ACTIVATION:
        b_y = activate(b_y)
    if seed is not None:
        b_y *= dropout_gain(seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW)
    return b_y


@triton.jit
def statistics_part(
    p_x, p_mean, p_rstd, p_pre, p_partial_mean, p_partial_m2, p_word, i_unit, i_part, parts, i_n,
    i_slab, o_i, o_c, m_c, begin, end, C, HW, splits, chunk, pre_n, eps, CG: tl.constexpr,
    SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics of a part; the program that comes last merges those of the unit."""
    _, stride_hw = strides(C, HW, CHANNELS_LAST)
    mean, m2 = statistics_of(p_x, m_c, begin, end, stride_hw, BLOCK_C, BLOCK_HW, EVEN, FULL, STAGES)
    channels = tl.minimum(SLAB - i_part // splits * BLOCK_C, BLOCK_C) if BLOCK_G == 1 else CG
    mean += load_channels(p_pre, i_n, o_c, m_c, pre_n, 0.0)
    mean, m2 = merge_channels(mean, m2, o_i, m_c, end - begin, channels, CG, BLOCK_G)
    store_group_parts(p_partial_mean, mean, i_unit, i_part, parts, o_i, m_c, CG, SLAB, BLOCK_G)
    store_group_parts(p_partial_m2, m2, i_unit, i_part, parts, o_i, m_c, CG, SLAB, BLOCK_G)
    if arrive(p_word) == parts - 1:
        unit_mean, unit_m2 = merge_parts(
            p_partial_mean, p_partial_m2, i_unit, parts, HW, splits, chunk, CG, SLAB, BLOCK_C,
            BLOCK_S, BLOCK_G,
        )  # fmt: skip
        o_group, m_group = unit_groups(i_n, i_slab, C, CG, SLAB, BLOCK_G)
        tl.store(p_mean + o_group, unit_mean, mask=m_group)
        tl.store(p_rstd + o_group, 1.0 / tl.sqrt(unit_m2 / (HW * 1.0 * CG) + eps), mask=m_group)
        arrive(p_word)


@triton.jit
def apply_part(
    p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, p_word, parts,
    i_n, i_slab, o_c, m_c, begin, end, C, HW, scale_n, shift_n, pre_n, dropout_p,
    PHASE: tl.constexpr, CG: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The output of a part, from the statistics in p_mean and p_rstd once they are there."""
    _, stride_hw = strides(C, HW, CHANNELS_LAST)
    seed = p_seed
    if p_seed is not None:
        seed = tl.load(p_seed)  # Here, since compilers leave it in the loop.
    b_gain, b_offset = load_modulation(
        p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
    )
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, 0.0)
    if PHASE == "split":
        wait_until(p_word, parts + 1)
    mean = load_groups(p_mean, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    rstd = load_groups(p_rstd, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    centre = (mean - b_pre)[:, None]
    gain = (b_gain * rstd)[:, None]
    offset = b_offset[:, None]
    o_j = tl.arange(0, BLOCK_HW)
    for hw in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        o_hw = (hw - begin) * stride_hw
        b_x = load_tile(p_x + o_hw, m_c, hw + o_j, end, EVEN, FULL, "evict_first")
        b_y = output_of(
            b_x, centre, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, ACTIVATION
        )
        store_tile(p_y + o_hw, b_y, m_c, hw + o_j, end, EVEN, FULL)
    if PHASE == "split":
        leave(p_word, 2 * parts)


@triton.jit
def whole_unit(
    p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, i_n, i_slab, o_i,
    o_c, m_c, C, HW, scale_n, shift_n, pre_n, eps, dropout_p, PHASE: tl.constexpr, CG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics and output of a unit, from registers or in two passes."""
    _, stride_hw = strides(C, HW, CHANNELS_LAST)
    seed = p_seed
    if p_seed is not None:
        seed = tl.load(p_seed)
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, 0.0)
    o_j = tl.arange(0, BLOCK_HW)
    if PHASE == "resident":
        b_x = load_tile(p_x, m_c, o_j, HW, EVEN, FULL, "evict_first")
        mean, m2 = resident_statistics(
            b_x, b_pre, o_i, o_j, m_c, HW, CG, BLOCK_G, EVEN, FULL
        )  # fmt: skip
    else:
        of_channel, squares = statistics_of(
            p_x, m_c, 0, HW, stride_hw, BLOCK_C, BLOCK_HW, EVEN, FULL, STAGES
        )
        mean, m2 = merge_channels(of_channel + b_pre, squares, o_i, m_c, HW, CG, CG, BLOCK_G)
    rstd = 1.0 / tl.sqrt(m2 / (HW * 1.0 * CG) + eps)
    m_first = m_c & (o_i % CG == 0)
    o_group = i_n.to(tl.int64) * (C // CG) + o_c // CG
    tl.store(p_mean + o_group, mean, mask=m_first)
    tl.store(p_rstd + o_group, rstd, mask=m_first)

    b_gain, b_offset = load_modulation(
        p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
    )
    centre = (mean - b_pre)[:, None]
    gain = (b_gain * rstd)[:, None]
    offset = b_offset[:, None]
    if PHASE == "resident":
        b_y = output_of(
            b_x, centre, gain, offset, seed, dropout_p, i_n, o_c, 0, HW, BLOCK_HW, ACTIVATION
        )
        store_tile(p_y, b_y, m_c, o_j, HW, EVEN, FULL)
    else:
        for hw in tl.range(0, HW, BLOCK_HW, num_stages=STAGES):
            o_hw = hw * stride_hw
            b_t = load_tile(p_x + o_hw, m_c, hw + o_j, HW, EVEN, FULL, "evict_first")
            b_y = output_of(
                b_t, centre, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, ACTIVATION
            )
            store_tile(p_y + o_hw, b_y, m_c, hw + o_j, HW, EVEN, FULL)


@triton.jit(do_not_specialize=["splits", "tiles", "lag"])
def forward_kernel(
    p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, p_partial_mean,
    p_partial_m2, p_words, C, HW, splits, tiles, lag, scale_n, shift_n, pre_n, eps, dropout_p,
    PHASE: tl.constexpr, CG: tl.constexpr, SLAB: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: a unit (n, slab), or a part (channel block, split) of one."""
    slabs = tl.cdiv(C, SLAB)
    parts = tl.cdiv(SLAB, BLOCK_C) * splits
    chunk = tiles * BLOCK_HW
    if PHASE == "split":
        is_statistics, i_work = work_of(draw_ticket(p_words), lag)
    else:
        i_work = tl.program_id(0)
    i_unit = i_work // parts
    i_part = i_work % parts
    i_n = i_unit // slabs
    i_slab = i_unit % slabs
    o_i = i_part // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    o_c = i_slab * SLAB + o_i
    m_c = (o_i < SLAB) & (o_c < C)
    begin = i_part % splits * chunk
    end = tl.minimum(HW, begin + chunk)
    i_c = i_slab * SLAB + i_part // splits * BLOCK_C
    o_corner = corner_of(i_n, i_c, begin, C, HW, CHANNELS_LAST)
    o_tile = tile_offsets(C, HW, BLOCK_C, BLOCK_HW, CHANNELS_LAST)
    p_x += o_corner + o_tile
    p_y += o_corner + o_tile

    if PHASE == "split":
        p_word = p_words + 1 + i_unit
        if is_statistics:
            statistics_part(
                p_x, p_mean, p_rstd, p_pre, p_partial_mean, p_partial_m2, p_word, i_unit, i_part,
                parts, i_n, i_slab, o_i, o_c, m_c, begin, end, C, HW, splits, chunk, pre_n, eps, CG,
                SLAB, BLOCK_C, BLOCK_HW, BLOCK_S, BLOCK_G, CHANNELS_LAST, EVEN, FULL, STAGES,
            )  # fmt: skip
        else:
            apply_part(
                p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, p_word,
                parts, i_n, i_slab, o_c, m_c, begin, end, C, HW, scale_n, shift_n, pre_n,
                dropout_p, PHASE, CG, BLOCK_HW, BLOCK_G, CHANNELS_LAST, EVEN, FULL,
                ACTIVATION, STAGES,
            )  # fmt: skip
    elif PHASE == "rewrite":
        apply_part(
            p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, None,
            parts, i_n, i_slab, o_c, m_c, begin, end, C, HW, scale_n, shift_n, pre_n, dropout_p,
            PHASE, CG, BLOCK_HW, BLOCK_G, CHANNELS_LAST, EVEN, FULL, ACTIVATION, STAGES,
        )  # fmt: skip
    else:
        whole_unit(
            p_x, p_y, p_mean, p_rstd, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, i_n,
            i_slab, o_i, o_c, m_c, C, HW, scale_n, shift_n, pre_n, eps, dropout_p, PHASE, CG,
            BLOCK_C, BLOCK_HW, BLOCK_G, CHANNELS_LAST, EVEN, FULL, ACTIVATION, STAGES,
        )  # fmt: skip
