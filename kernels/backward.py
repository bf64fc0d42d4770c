"""Backward kernels: dx, and the gradient of every parameter.

With x̂ = (x − μ)r, z = x̂γ' + β' and dz = dy·dropout·act'(z), all recomputed from x, the sums are
S1 = Σ dz and S2 = Σ dz·x̂ over the positions of a channel, and

    c2 = Σ_{c∈g} γ'S1 / M,   c1 = Σ_{c∈g} γ'S2 / M,   dx = r(γ'dz − c2 − x̂c1).

The pre-norm add needs db = Σ dx = r(γ'S1 − HW·c2 − c1·S3) with S3 = Σ x̂, so it costs no pass.
`backward_kernel` has the forward's phases, "sums" in the place of "statistics";
`parameter_gradients_kernel` turns the sums into gradients. No atomics: partial sums have a place of
their own, and every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resblock_bench.kernels.tiles import (
    activation_gradient,
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
def normalised_and_gradient(
    b_x, b_dy, m_tile, mean, rstd, gain, offset, seed, dropout_p, i_n, o_c, hw, HW,
    BLOCK_HW: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x̂ and dz of a tile; both 0 at positions past its end."""
    x_hat = (b_x - mean) * rstd
    dz = b_dy
    if not EVEN:
        x_hat = tl.where(m_tile, x_hat, 0.0)
    if seed is not None:
        dz *= dropout_gain(seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW)
    if ACTIVATION:
        dz *= activation_gradient(x_hat * gain + offset)
    return x_hat, dz


@triton.jit
def backward_unit(
    i_unit, i_slot, i_part, parts, p_dy, p_x, p_dx, p_mean, p_rstd, p_s1, p_s2, p_db, p_weight,
    p_bias, p_scale, p_shift, p_pre, p_seed, p_partial_s1, p_partial_s2, p_partial_s3, p_barrier,
    C, HW, splits, chunk, scale_n, shift_n, pre_n, dropout_p, PHASE: tl.constexpr,
    CG: tl.constexpr, SLAB: tl.constexpr, BLOCK_SLAB: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RESIDENT: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    b_gain, b_offset = load_modulation(
        p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, scale_n, shift_n
    )
    gain = b_gain[:, None]
    offset = b_offset[:, None]
    mean, rstd = load_statistics(p_mean, p_rstd, i_n, i_slab, o_c, m_c, C, CG, BLOCK_G)
    column_mean = down_channels(mean, BLOCK_G)
    column_rstd = down_channels(rstd, BLOCK_G)

    if RESIDENT:
        m_tile = within(m_c, o_j, HW, EVEN)
        b_x = tl.load(p_x + corner + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + corner + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        x_hat, dz = normalised_and_gradient(
            b_x + b_pre[:, None], b_dy, m_tile, column_mean, column_rstd, gain, offset,
            seed, dropout_p, i_n, o_c, 0, HW, BLOCK_HW, EVEN, ACTIVATION,
        )  # fmt: skip
        s1 = tl.sum(dz, axis=1)
        s2 = tl.sum(dz * x_hat, axis=1)
        if p_pre is not None:
            s3 = tl.sum(x_hat, axis=1)
    elif PHASE != "apply":
        # Summed lane by lane; no lane waits for another before the last tile.
        lane_s1 = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
        lane_s2 = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
        lane_s3 = tl.zeros([BLOCK_C, BLOCK_HW], tl.float32)
        for hw in range(begin, end, BLOCK_HW):
            m_t = within(m_c, hw + o_j, end, EVEN)
            o_corner = corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
            b_t = tl.load(p_x + o_corner, mask=m_t, other=0.0, eviction_policy="evict_last")
            b_dt = tl.load(p_dy + o_corner, mask=m_t, other=0.0, eviction_policy="evict_last")
            t_hat, dz_t = normalised_and_gradient(
                b_t.to(tl.float32) + b_pre[:, None], b_dt.to(tl.float32), m_t, column_mean,
                column_rstd, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW, EVEN,
                ACTIVATION,
            )  # fmt: skip
            lane_s1 += dz_t
            lane_s2 += dz_t * t_hat
            if p_pre is not None:
                lane_s3 += t_hat
        s1 = tl.sum(lane_s1, axis=1)
        s2 = tl.sum(lane_s2, axis=1)
        if p_pre is not None:
            s3 = tl.sum(lane_s3, axis=1)
    if PHASE == "sums" or PHASE == "cooperative":
        o_partial = (i_n.to(tl.int64) * splits + i_split) * C + o_c
        tl.store(p_partial_s1 + o_partial, s1, mask=m_c)
        tl.store(p_partial_s2 + o_partial, s2, mask=m_c)
        if p_pre is not None:
            tl.store(p_partial_s3 + o_partial, s3, mask=m_c)

    if PHASE == "cooperative":
        wait_for(p_barrier + i_slot, i_part == 0, parts)

    if PHASE != "sums":
        # The channels of the whole slab, of which a part may have some.
        o_k = tl.arange(0, BLOCK_SLAB)
        o_slab = i_slab * SLAB + o_k
        m_slab = (o_k < SLAB) & (o_slab < C)
        if PHASE == "whole":
            slab_gain = b_gain
        else:
            s1 = tl.sum(
                load_partials(p_partial_s1, i_n, o_slab, m_slab, C, splits, BLOCK_S), axis=1
            )
            s2 = tl.sum(
                load_partials(p_partial_s2, i_n, o_slab, m_slab, C, splits, BLOCK_S), axis=1
            )
            slab_gain, _ = load_modulation(
                p_weight, None, p_scale, None, i_n, o_slab, m_slab, scale_n, 0
            )
        elements = HW * 1.0 * CG
        c2 = fold_groups(slab_gain * s1, o_k, m_slab, CG, BLOCK_G) / elements
        c1 = fold_groups(slab_gain * s2, o_k, m_slab, CG, BLOCK_G) / elements
        o_channel = i_n.to(tl.int64) * C + o_slab
        m_first = m_slab & (i_part == 0)
        tl.store(p_s1 + o_channel, s1, mask=m_first)
        tl.store(p_s2 + o_channel, s2, mask=m_first)
        if p_pre is not None:
            if PHASE != "whole":
                s3 = tl.sum(
                    load_partials(p_partial_s3, i_n, o_slab, m_slab, C, splits, BLOCK_S), axis=1
                )
            tl.store(p_db + o_channel, rstd * (slab_gain * s1 - c2 * HW - c1 * s3), mask=m_first)

        column_c1 = down_channels(c1, BLOCK_G)
        column_c2 = down_channels(c2, BLOCK_G)
        if RESIDENT:
            b_dx = column_rstd * (gain * dz - column_c2 - x_hat * column_c1)
            tl.store(p_dx + corner + o_tile, b_dx, mask=m_tile)
        else:
            for hw in range(begin, end, BLOCK_HW):
                m_t = within(m_c, hw + o_j, end, EVEN)
                o_corner = corner + tl.cast(hw, tl.int64) * stride_hw + o_tile
                b_t = tl.load(p_x + o_corner, mask=m_t, other=0.0, eviction_policy="evict_first")
                b_dt = tl.load(p_dy + o_corner, mask=m_t, other=0.0, eviction_policy="evict_first")
                t_hat, dz_t = normalised_and_gradient(
                    b_t.to(tl.float32) + b_pre[:, None], b_dt.to(tl.float32), m_t, column_mean,
                    column_rstd, gain, offset, seed, dropout_p, i_n, o_c, hw, HW, BLOCK_HW,
                    EVEN, ACTIVATION,
                )  # fmt: skip
                b_dx = column_rstd * (gain * dz_t - column_c2 - t_hat * column_c1)
                tl.store(p_dx + o_corner, b_dx, mask=m_t)


@triton.jit
def backward_kernel(
    p_dy, p_x, p_dx, p_mean, p_rstd, p_s1, p_s2, p_db, p_weight, p_bias, p_scale, p_shift, p_pre,
    p_seed, p_partial_s1, p_partial_s2, p_partial_s3, p_barrier, C, HW, splits, chunk, first, end,
    scale_n, shift_n, pre_n, dropout_p, PHASE: tl.constexpr, CG: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RESIDENT: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
            backward_unit(
                i_unit, i_slot, i_part, parts, p_dy, p_x, p_dx, p_mean, p_rstd, p_s1, p_s2, p_db,
                p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, p_partial_s1, p_partial_s2,
                p_partial_s3, p_barrier, C, HW, splits, chunk, scale_n, shift_n, pre_n, dropout_p,
                PHASE, CG, SLAB, BLOCK_SLAB, BLOCK_C, BLOCK_HW, BLOCK_S, BLOCK_G,
                CHANNELS_LAST, RESIDENT, EVEN, ACTIVATION,
            )  # fmt: skip
    else:
        backward_unit(
            first + i_slot, i_slot, i_part, parts, p_dy, p_x, p_dx, p_mean, p_rstd, p_s1, p_s2,
            p_db, p_weight, p_bias, p_scale, p_shift, p_pre, p_seed, p_partial_s1, p_partial_s2,
            p_partial_s3, p_barrier, C, HW, splits, chunk, scale_n, shift_n, pre_n, dropout_p,
            PHASE, CG, SLAB, BLOCK_SLAB, BLOCK_C, BLOCK_HW, BLOCK_S, BLOCK_G,
            CHANNELS_LAST, RESIDENT, EVEN, ACTIVATION,
        )  # fmt: skip


@triton.jit
def parameter_gradients_kernel(
    p_s1, p_s2, p_db, p_weight, p_bias, p_scale, p_dweight, p_dbias, p_dscale, p_dshift, p_dpre,
    N, C, scale_n, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program: a block of channels, over all samples in order.

    dshift = S1, dscale = γS2 + βS1, dbias = Σ_n (1 + s)S1, dweight = Σ_n (1 + s)S2.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_weight = load_channels(p_weight, tl.program_id(0), o_c, m_c, 0, 1.0)[None, :]
    b_bias = load_channels(p_bias, tl.program_id(0), o_c, m_c, 0, 0.0)[None, :]
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        mask = (o_n < N)[:, None] & m_c[None, :]
        o_row = o_n.to(tl.int64)[:, None]
        o_sum = o_row * C + o_c[None, :]
        s1 = tl.load(p_s1 + o_sum, mask=mask, other=0.0)
        s2 = tl.load(p_s2 + o_sum, mask=mask, other=0.0)
        if p_dshift is not None:
            tl.store(p_dshift + o_sum, s1, mask=mask)
        if p_dpre is not None:
            tl.store(p_dpre + o_sum, tl.load(p_db + o_sum, mask=mask, other=0.0), mask=mask)
        if p_scale is not None:
            tl.store(p_dscale + o_sum, b_weight * s2 + b_bias * s1, mask=mask)
            b_scale = tl.load(p_scale + o_row * scale_n + o_c[None, :], mask=mask, other=0.0)
            s1 *= 1.0 + b_scale.to(tl.float32)
            s2 *= 1.0 + b_scale.to(tl.float32)
        dweight += tl.sum(s2, axis=0)
        dbias += tl.sum(s1, axis=0)
    if p_dweight is not None:
        tl.store(p_dweight + o_c, dweight, mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + o_c, dbias, mask=m_c)
