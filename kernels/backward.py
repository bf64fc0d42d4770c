"""Backward kernel: dx, and the gradient of every parameter, in one launch.

With d = x − μ, z = d·rγ' + β' and dz = dy·dropout·act'(z), all recomputed from x, the sums are
S1 = Σ dz, S2 = r·Σ dz·d and S3 = r·Σ d over the positions of a channel, and

    c2 = Σ_{c∈g} γ'S1 / M,   c1 = Σ_{c∈g} γ'S2 / M,   dx = rγ'·dz − (r²c1·d + r·c2).

The pre-norm add needs db = Σ dx = r(γ'S1 − HW·c2 − c1·S3), so it costs no pass. The phases are the
forward's. In "split" the part that ends a unit's sums folds what its groups need, and the first
part to apply folds the rest; the unit that comes last of all samples reduces dweight and dbias. No
float atomics: partial sums have a place of their own, and every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    activation_gradient,
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
    work_of,
)


@triton.jit
def gradient_of(
    d, b_dy, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dz of a tile, 0 wherever dy is."""
    dz = b_dy
    if seed is not None:
        dz *= dropout_gain(seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW)
    if ACTIVATION:
        dz *= activation_gradient(d * gain + offset)
    return dz


@triton.jit
def sums_of(
    p_dy, p_x, m_c, begin, end, stride_hw, centre, gain, offset, seed, dropout_p, i_n, o_c, HW,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr, SHIFTED: tl.constexpr, EVEN: tl.constexpr,
    FULL: tl.constexpr, ACTIVATION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Per channel Σ dz, Σ dz·d and, where SHIFTED, Σ d over positions begin … end − 1."""
    o_j = tl.arange(0, BLOCK_HW)
    # Summed lane by lane; no lane waits for another before the last tile.
    lane_dz = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
    lane_dzd = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
    lane_d = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
    for hw in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        o_hw = (hw - begin) * stride_hw
        b_x = load_tile(p_x + o_hw, m_c, hw + o_j, end, EVEN, FULL, "evict_last")
        b_dy = load_tile(p_dy + o_hw, m_c, hw + o_j, end, EVEN, FULL, "evict_last")
        d = b_x - centre
        dz = gradient_of(
            d, b_dy, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, ACTIVATION
        )
        lane_dz += dz
        lane_dzd += dz * d
        if SHIFTED:
            if not EVEN:
                d = tl.where((hw + o_j < end)[None, :], d, 0.0)
            lane_d += d
    return tl.sum(lane_dz, axis=1), tl.sum(lane_dzd, axis=1), tl.sum(lane_d, axis=1)


@triton.jit
def parameter_gradients(
    s1, s2, s3, c1, c2, slab_gain, rstd, p_s1, p_s2, p_weight, p_bias, p_scale, p_pre, p_dweight,
    p_dbias, p_dscale, p_dshift, p_dpre, p_slab, i_n, o_c, m_c, N, C, HW, scale_n,
    BLOCK_SLAB: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a unit whose sums are known; of all samples where it is the last of its slab.

    dshift = S1, dscale = γS2 + βS1, dbias = Σ_n (1 + s)S1, dweight = Σ_n (1 + s)S2.
    """
    o_row = i_n.to(tl.int64) * C + o_c
    if p_pre is not None:
        tl.store(p_dpre + o_row, rstd * (slab_gain * s1 - c2 * HW - c1 * s3), mask=m_c)
    if p_dshift is not None:
        tl.store(p_dshift + o_row, s1, mask=m_c)
    if p_scale is not None:
        b_weight = load_channels(p_weight, i_n, o_c, m_c, 0, 1.0)
        b_bias = load_channels(p_bias, i_n, o_c, m_c, 0, 0.0)
        tl.store(p_dscale + o_row, b_weight * s2 + b_bias * s1, mask=m_c)
    if p_s1 is not None:
        one_plus_scale = 1.0 + load_channels(p_scale, i_n, o_c, m_c, scale_n, 0.0)
        tl.store(p_s1 + o_row, one_plus_scale * s1, mask=m_c)
        tl.store(p_s2 + o_row, one_plus_scale * s2, mask=m_c)
        if arrive(p_slab) == N - 1:
            dbias = tl.zeros([BLOCK_N, BLOCK_SLAB], tl.float32)
            dweight = tl.zeros([BLOCK_N, BLOCK_SLAB], tl.float32)
            for n in range(0, N, BLOCK_N):
                o_n = n + tl.arange(0, BLOCK_N)
                mask = (o_n < N)[:, None] & m_c[None, :]
                o_rows = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
                # From L2: this multiprocessor's own cache does not know what others wrote.
                dbias += tl.load(p_s1 + o_rows, mask=mask, other=0.0, cache_modifier=".cg")
                dweight += tl.load(p_s2 + o_rows, mask=mask, other=0.0, cache_modifier=".cg")
            if p_dweight is not None:
                tl.store(p_dweight + o_c, tl.sum(dweight, axis=0), mask=m_c)
            if p_dbias is not None:
                tl.store(p_dbias + o_c, tl.sum(dbias, axis=0), mask=m_c)
            tl.store(p_slab, 0)


@triton.jit
def sum_channel_parts(
    p_partial, i_n, o_c, m_c, C, splits, BLOCK_SLAB: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sum over [N, splits, C] of what all splits stored for these channels, in their order."""
    total = tl.zeros([BLOCK_SLAB, BLOCK_N], tl.float32)
    p_first = p_partial + i_n.to(tl.int64) * splits * C
    for first in range(0, splits, BLOCK_N):
        o_s = first + tl.arange(0, BLOCK_N)
        mask = m_c[:, None] & (o_s < splits)[None, :]
        # From L2, as in `load_groups`.
        total += tl.load(
            p_first + o_s[None, :] * C + o_c[:, None], mask=mask, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(total, axis=1)


@triton.jit
def sum_group_parts(
    p_partial, i_unit, parts, CG: tl.constexpr, SLAB: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The sum of what the parts of a unit stored, in their order: [BLOCK_G]."""
    total = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    for first in range(0, parts, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        total += load_group_parts(p_partial, i_unit, o_s, parts, CG, SLAB, BLOCK_G)
    return tl.sum(total, axis=1)


@triton.jit
def sums_part(
    p_dy, p_x, p_mean, p_rstd, p_c1, p_c2, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed,
    p_partial_s1, p_partial_s2, p_partial_s3, p_group_s1, p_group_s2, p_word, i_unit, i_part,
    parts, i_n, i_slab, o_i, o_c, m_c, b_pre, begin, end, C, HW, splits, scale_n, shift_n,
    dropout_p, CG: tl.constexpr, SLAB: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of a part; the program that comes last folds those of the unit's groups."""
    _, stride_hw = strides(C, HW, CHANNELS_LAST)
    seed = p_seed
    if p_seed is not None:
        seed = tl.load(p_seed)  # Here, since compilers leave it in the loop.
    b_gain, b_offset = load_modulation(
        p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
    )
    mean = load_groups(p_mean, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    rstd = load_groups(p_rstd, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    s1, s2, s3 = sums_of(
        p_dy, p_x, m_c, begin, end, stride_hw, (mean - b_pre)[:, None], (b_gain * rstd)[:, None],
        b_offset[:, None], seed, dropout_p, i_n, o_c, HW, BLOCK_C, BLOCK_HW, p_pre is not None,
        EVEN, FULL, ACTIVATION, STAGES,
    )  # fmt: skip
    s2 *= rstd
    o_partial = (i_n.to(tl.int64) * splits + i_part % splits) * C + o_c
    tl.store(p_partial_s1 + o_partial, s1, mask=m_c)
    tl.store(p_partial_s2 + o_partial, s2, mask=m_c)
    if p_pre is not None:
        tl.store(p_partial_s3 + o_partial, s3 * rstd, mask=m_c)
    g1 = fold_groups(b_gain * s1, o_i, m_c, CG, BLOCK_G)
    g2 = fold_groups(b_gain * s2, o_i, m_c, CG, BLOCK_G)
    store_group_parts(p_group_s1, g1, i_unit, i_part, parts, o_i, m_c, CG, SLAB, BLOCK_G)
    store_group_parts(p_group_s2, g2, i_unit, i_part, parts, o_i, m_c, CG, SLAB, BLOCK_G)
    if arrive(p_word) == parts - 1:
        elements = HW * 1.0 * CG
        c2 = sum_group_parts(p_group_s1, i_unit, parts, CG, SLAB, BLOCK_S, BLOCK_G) / elements
        c1 = sum_group_parts(p_group_s2, i_unit, parts, CG, SLAB, BLOCK_S, BLOCK_G) / elements
        o_group, m_group = unit_groups(i_n, i_slab, C, CG, SLAB, BLOCK_G)
        tl.store(p_c1 + o_group, c1, mask=m_group)
        tl.store(p_c2 + o_group, c2, mask=m_group)
        arrive(p_word)


@triton.jit
def apply_part(
    p_dy, p_x, p_dx, p_mean, p_rstd, p_c1, p_c2, p_s1, p_s2, p_weight, p_bias, p_scale, p_shift,
    p_pre, p_seed, p_dweight, p_dbias, p_dscale, p_dshift, p_dpre, p_partial_s1, p_partial_s2,
    p_partial_s3, p_slab, p_word, i_part, parts, i_n, i_slab, o_c, m_c, b_pre, begin, end, N, C,
    HW, splits, scale_n, shift_n, dropout_p, CG: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_SLAB: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a part once its unit's c1 and c2 are there; the first part sees to the parameters."""
    _, stride_hw = strides(C, HW, CHANNELS_LAST)
    seed = p_seed
    if p_seed is not None:
        seed = tl.load(p_seed)
    b_gain, b_offset = load_modulation(
        p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
    )
    mean = load_groups(p_mean, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    rstd = load_groups(p_rstd, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    wait_until(p_word, parts + 1)
    c1 = load_groups(p_c1, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    c2 = load_groups(p_c2, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    centre = (mean - b_pre)[:, None]
    gain = (b_gain * rstd)[:, None]
    offset = b_offset[:, None]
    zeros = tl.zeros(o_c.shape, tl.float32)
    slope = (zeros + rstd * rstd * c1)[:, None]
    level = (zeros + rstd * c2)[:, None]
    o_j = tl.arange(0, BLOCK_HW)
    for hw in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        o_hw = (hw - begin) * stride_hw
        b_x = load_tile(p_x + o_hw, m_c, hw + o_j, end, EVEN, FULL, "evict_first")
        b_dy = load_tile(p_dy + o_hw, m_c, hw + o_j, end, EVEN, FULL, "evict_first")
        d = b_x - centre
        dz = gradient_of(
            d, b_dy, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, ACTIVATION
        )
        b_dx = gain * dz - (slope * d + level)
        store_tile(p_dx + o_hw, b_dx, m_c, hw + o_j, end, EVEN, FULL)
    if i_part == 0:
        o_k = i_slab * SLAB + tl.arange(0, BLOCK_SLAB)
        m_k = (tl.arange(0, BLOCK_SLAB) < SLAB) & (o_k < C)
        s1 = sum_channel_parts(p_partial_s1, i_n, o_k, m_k, C, splits, BLOCK_SLAB, BLOCK_N)
        s2 = sum_channel_parts(p_partial_s2, i_n, o_k, m_k, C, splits, BLOCK_SLAB, BLOCK_N)
        s3 = s1
        if p_pre is not None:
            s3 = sum_channel_parts(p_partial_s3, i_n, o_k, m_k, C, splits, BLOCK_SLAB, BLOCK_N)
        k_gain = load_modulation(p_weight, None, p_scale, None, i_n, o_k, m_k, scale_n, 0)[0]
        parameter_gradients(
            s1, s2, s3, load_groups(p_c1, i_n, i_slab, o_k, m_k, C, CG, BLOCK_G),
            load_groups(p_c2, i_n, i_slab, o_k, m_k, C, CG, BLOCK_G), k_gain,
            load_groups(p_rstd, i_n, i_slab, o_k, m_k, C, CG, BLOCK_G), p_s1, p_s2, p_weight,
            p_bias, p_scale, p_pre, p_dweight, p_dbias, p_dscale, p_dshift, p_dpre, p_slab, i_n,
            o_k, m_k, N, C, HW, scale_n, BLOCK_SLAB, BLOCK_N,
        )  # fmt: skip
    leave(p_word, 2 * parts)


@triton.jit
def whole_unit(
    p_dy, p_x, p_dx, p_mean, p_rstd, p_s1, p_s2, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed,
    p_dweight, p_dbias, p_dscale, p_dshift, p_dpre, p_slab, i_n, i_slab, o_i, o_c, m_c, b_pre, N,
    C, HW, scale_n, shift_n, dropout_p, PHASE: tl.constexpr, CG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx and the parameters' gradients of a unit, from registers or in two passes."""
    _, stride_hw = strides(C, HW, CHANNELS_LAST)
    seed = p_seed
    if p_seed is not None:
        seed = tl.load(p_seed)
    b_gain, b_offset = load_modulation(
        p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
    )
    mean = load_groups(p_mean, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    rstd = load_groups(p_rstd, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    centre = (mean - b_pre)[:, None]
    gain = (b_gain * rstd)[:, None]
    offset = b_offset[:, None]
    o_j = tl.arange(0, BLOCK_HW)
    if PHASE == "resident":
        d = load_tile(p_x, m_c, o_j, HW, EVEN, FULL, "evict_first") - centre
        b_dy = load_tile(p_dy, m_c, o_j, HW, EVEN, FULL, "evict_first")
        dz = gradient_of(
            d, b_dy, gain, offset, seed, dropout_p, i_n, o_c, 0, HW, BLOCK_HW, ACTIVATION
        )
        s1 = tl.sum(dz, axis=1)
        s2 = tl.sum(dz * d, axis=1)
        s3 = s1
        if p_pre is not None:
            s3 = tl.sum(d if EVEN else tl.where((o_j < HW)[None, :], d, 0.0), axis=1)
    else:
        s1, s2, s3 = sums_of(
            p_dy, p_x, m_c, 0, HW, stride_hw, centre, gain, offset, seed, dropout_p, i_n, o_c, HW,
            BLOCK_C, BLOCK_HW, p_pre is not None, EVEN, FULL, ACTIVATION, STAGES,
        )  # fmt: skip
    s2 *= rstd
    elements = HW * 1.0 * CG
    c2 = fold_groups(b_gain * s1, o_i, m_c, CG, BLOCK_G) / elements
    c1 = fold_groups(b_gain * s2, o_i, m_c, CG, BLOCK_G) / elements
    zeros = tl.zeros(o_c.shape, tl.float32)
    slope = (zeros + rstd * rstd * c1)[:, None]
    level = (zeros + rstd * c2)[:, None]
    if PHASE == "resident":
        store_tile(p_dx, gain * dz - (slope * d + level), m_c, o_j, HW, EVEN, FULL)
    else:
        for hw in tl.range(0, HW, BLOCK_HW, num_stages=STAGES):
            o_hw = hw * stride_hw
            b_x = load_tile(p_x + o_hw, m_c, hw + o_j, HW, EVEN, FULL, "evict_first")
            b_dy = load_tile(p_dy + o_hw, m_c, hw + o_j, HW, EVEN, FULL, "evict_first")
            d_t = b_x - centre
            dz_t = gradient_of(
                d_t, b_dy, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, ACTIVATION
            )
            b_dx = gain * dz_t - (slope * d_t + level)
            store_tile(p_dx + o_hw, b_dx, m_c, hw + o_j, HW, EVEN, FULL)
    parameter_gradients(
        s1, s2, s3 * rstd, c1, c2, b_gain, rstd, p_s1, p_s2, p_weight, p_bias, p_scale, p_pre,
        p_dweight, p_dbias, p_dscale, p_dshift, p_dpre, p_slab, i_n, o_c, m_c, N, C, HW, scale_n,
        BLOCK_C, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "splits", "tiles", "lag"])
def backward_kernel(
    p_dy, p_x, p_dx, p_mean, p_rstd, p_c1, p_c2, p_s1, p_s2, p_weight, p_bias, p_scale, p_shift,
    p_pre, p_seed, p_dweight, p_dbias, p_dscale, p_dshift, p_dpre, p_partial_s1, p_partial_s2,
    p_partial_s3, p_group_s1, p_group_s2, p_words, N, C, HW, splits, tiles, lag, scale_n, shift_n,
    pre_n, dropout_p, PHASE: tl.constexpr, CG: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: a unit (n, slab), or a part (channel block, split) of one."""
    slabs = tl.cdiv(C, SLAB)
    parts = tl.cdiv(SLAB, BLOCK_C) * splits
    chunk = tiles * BLOCK_HW
    if PHASE == "split":
        is_sums, i_work = work_of(draw_ticket(p_words), lag)
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
    b_pre = load_channels(p_pre, i_n, o_c, m_c, pre_n, 0.0)
    i_c = i_slab * SLAB + i_part // splits * BLOCK_C
    o_corner = corner_of(i_n, i_c, begin, C, HW, CHANNELS_LAST)
    o_tile = tile_offsets(C, HW, BLOCK_C, BLOCK_HW, CHANNELS_LAST)
    p_dy += o_corner + o_tile
    p_x += o_corner + o_tile
    p_dx += o_corner + o_tile

    p_slab = None
    if p_s1 is not None:
        p_slab = p_words + 1 + i_slab
    if PHASE == "split":
        p_word = p_words + 1 + slabs + i_unit
        if is_sums:
            sums_part(
                p_dy, p_x, p_mean, p_rstd, p_c1, p_c2, p_weight, p_bias, p_scale, p_shift, p_pre,
                p_seed, p_partial_s1, p_partial_s2, p_partial_s3, p_group_s1, p_group_s2, p_word,
                i_unit, i_part, parts, i_n, i_slab, o_i, o_c, m_c, b_pre, begin, end, C, HW,
                splits, scale_n, shift_n, dropout_p, CG, SLAB, BLOCK_C, BLOCK_HW, BLOCK_S, BLOCK_G,
                CHANNELS_LAST, EVEN, FULL, ACTIVATION, STAGES,
            )  # fmt: skip
        else:
            apply_part(
                p_dy, p_x, p_dx, p_mean, p_rstd, p_c1, p_c2, p_s1, p_s2, p_weight, p_bias, p_scale,
                p_shift, p_pre, p_seed, p_dweight, p_dbias, p_dscale, p_dshift, p_dpre,
                p_partial_s1, p_partial_s2, p_partial_s3, p_slab, p_word, i_part, parts, i_n,
                i_slab, o_c, m_c, b_pre, begin, end, N, C, HW, splits, scale_n, shift_n, dropout_p,
                CG, SLAB, BLOCK_SLAB, BLOCK_HW, BLOCK_N, BLOCK_G, CHANNELS_LAST, EVEN, FULL,
                ACTIVATION, STAGES,
            )  # fmt: skip
    else:
        whole_unit(
            p_dy, p_x, p_dx, p_mean, p_rstd, p_s1, p_s2, p_weight, p_bias, p_scale, p_shift, p_pre,
            p_seed, p_dweight, p_dbias, p_dscale, p_dshift, p_dpre, p_slab, i_n, i_slab, o_i, o_c,
            m_c, b_pre, N, C, HW, scale_n, shift_n, dropout_p, PHASE, CG, BLOCK_C, BLOCK_HW,
            BLOCK_N, BLOCK_G, CHANNELS_LAST, EVEN, FULL, ACTIVATION, STAGES,
        )  # fmt: skip
