"""Pieces that the kernels share: addresses, modulation, activation, dropout, folds, tickets.

Tiles are [channels, positions] in fp32. Which of the two directions is contiguous in memory is in
the strides alone, so one kernel serves both layouts: the stride of 1 is a compile-time constant,
and Triton lays out the tile's threads along it.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter knows no inline assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


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
def tile_offsets(C, HW, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile from its corner. The corner is an int64 scalar; these fit in int32."""
    stride_c, stride_hw = strides(C, HW, CHANNELS_LAST)
    return tl.arange(0, BLOCK_C)[:, None] * stride_c + tl.arange(0, BLOCK_HW)[None, :] * stride_hw


@triton.jit
def corner_of(i_n, i_c, hw, C, HW, CHANNELS_LAST: tl.constexpr):
    """Offset of position `hw` of channel i_c of sample i_n, in int64: what a program starts from.

    From there on int32 suffices: a part is small, and a tier of whole units takes only samples
    that int32 can address.
    """
    stride_c, stride_hw = strides(C, HW, CHANNELS_LAST)
    return i_n.to(tl.int64) * C * HW + i_c.to(tl.int64) * stride_c + hw.to(tl.int64) * stride_hw


@triton.jit
def within(m_c, o_hw, end, EVEN: tl.constexpr, FULL: tl.constexpr):
    """The mask of a tile. EVEN: no tile reaches past `end`. FULL: none has channels too many."""
    if FULL:
        mask = (o_hw < end)[None, :]
    elif EVEN:
        mask = m_c[:, None]
    else:
        mask = m_c[:, None] & (o_hw < end)[None, :]
    return mask


@triton.jit
def load_tile(
    p_tile, m_c, o_hw, end, EVEN: tl.constexpr, FULL: tl.constexpr, EVICTION: tl.constexpr
):
    """A tile in fp32, 0 outside. Without a mask where none is needed: it would keep loads apart."""
    if EVEN and FULL:
        b_tile = tl.load(p_tile, eviction_policy=EVICTION)
    else:
        mask = within(m_c, o_hw, end, EVEN, FULL)
        b_tile = tl.load(p_tile, mask=mask, other=0.0, eviction_policy=EVICTION)
    return b_tile.to(tl.float32)


@triton.jit
def store_tile(p_tile, b_tile, m_c, o_hw, end, EVEN: tl.constexpr, FULL: tl.constexpr):
    if EVEN and FULL:
        tl.store(p_tile, b_tile)
    else:
        tl.store(p_tile, b_tile, mask=within(m_c, o_hw, end, EVEN, FULL))


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
def reciprocal(x):
    """1/x to one unit in the last place, in one instruction.

    A division compiles to the same instruction and to four that scale |x| > 2¹²⁶, where σ is 0.
    """
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def sigmoid(z):
    """1/(1 + e⁻ᶻ). By exp2: tl.exp compiles to the same and four instructions for subnormals."""
    return reciprocal(1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def activate(z):
    """SiLU: z·σ(z)."""
    return z * sigmoid(z)


@triton.jit
def activation_gradient(z):
    """dSiLU/dz = σ(1 + z(1 − σ))."""
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
def unit_groups(i_n, i_slab, C, CG: tl.constexpr, SLAB: tl.constexpr, BLOCK_G: tl.constexpr):
    """Where a unit's groups lie in an (N, G) tensor, [BLOCK_G], and which of them there are."""
    o_k = tl.arange(0, BLOCK_G)
    o_g = i_slab * (SLAB // CG) + o_k
    return i_n.to(tl.int64) * (C // CG) + o_g, (o_k < SLAB // CG) & (o_g < C // CG)


@triton.jit
def load_groups(p_groups, i_n, i_slab, o_c, m_c, C, CG: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of an fp32 (N, G) tensor the value of a slab's group, a scalar, or of every channel's group.

    From L2 and never from a multiprocessor's own cache, which other programs do not write to.
    """
    p_sample = p_groups + i_n.to(tl.int64) * (C // CG)
    if BLOCK_G == 1:
        per_group = tl.load(p_sample + i_slab, cache_modifier=".cg")
    else:
        per_group = tl.load(p_sample + o_c // CG, mask=m_c, other=0.0, cache_modifier=".cg")
    return per_group


@triton.jit
def store_group_parts(
    p_partial, per_group, i_unit, i_part, parts, o_i, m_c, CG: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """What a part comes to for each group of its unit, into [units, groups of a slab, parts]."""
    p_part = p_partial + i_unit.to(tl.int64) * (SLAB // CG) * parts + i_part
    if BLOCK_G == 1:
        tl.store(p_part, per_group)
    else:
        tl.store(p_part + o_i // CG * parts, per_group, mask=m_c & (o_i % CG == 0))


@triton.jit
def load_group_parts(
    p_partial, i_unit, o_s, parts, CG: tl.constexpr, SLAB: tl.constexpr, BLOCK_G: tl.constexpr
):
    """What `store_group_parts` stored for parts o_s: [BLOCK_G, parts], 0 where there is none."""
    GROUPS: tl.constexpr = SLAB // CG
    o_g = tl.arange(0, BLOCK_G)
    p_unit = p_partial + i_unit.to(tl.int64) * GROUPS * parts
    mask = (o_g < GROUPS)[:, None] & (o_s < parts)[None, :]
    # From L2, as in `load_groups`.
    return tl.load(
        p_unit + o_g[:, None] * parts + o_s[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )


# One launch with tickets (docs/kernels.md, "Tickets"). `p_words` are int32 and 0 before and after a
# launch: the ticket counter, a counter for each slab of the backward, a counter for each unit.


@triton.jit
def draw_ticket(p_words):
    """The number of this program in the order in which programs start to run."""
    ticket = tl.atomic_add(p_words, 1, sem="relaxed")
    if ticket == tl.num_programs(0) - 1:
        tl.store(p_words, 0)  # Everybody has drawn.
    return ticket


@triton.jit
def work_of(ticket, lag):
    """What a ticket is for: whether sums or apply, and the number of the part.

    The first `lag` are sums; then sums and apply, `lag` parts behind, take turns.
    """
    total = tl.num_programs(0) // 2
    later = ticket - lag
    alternating = later < 2 * (total - lag)
    is_sums = (later < 0) | (alternating & (later % 2 == 0))
    i_sums = tl.where(later < 0, ticket, lag + later // 2)
    i_apply = tl.where(alternating, later // 2, later - (total - lag))
    return is_sums, tl.where(is_sums, i_sums, i_apply)


@triton.jit
def arrive(p_word):
    """How many programs came here before. The last finds all that the others stored before."""
    tl.debug_barrier()  # What all threads stored comes before what the first one adds.
    before = tl.atomic_add(p_word, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def wait_until(p_word, count):
    """Return once `count` programs came here; what they stored before is then visible."""
    now = tl.atomic_add(p_word, 0, sem="acquire")
    while now < count:
        before = now
        now = tl.atomic_add(p_word, 0, sem="acquire")
        if INTERPRETED:
            # Programs run one after the other, so whoever is to come never does.
            tl.static_assert(now > before, "waits for ever for programs that come later")
    tl.debug_barrier()


@triton.jit
def leave(p_word, last):
    """Count on; who counts to `last` resets the word, since nobody looks at it any more."""
    if tl.atomic_add(p_word, 1, sem="relaxed") == last:
        tl.store(p_word, 0)
